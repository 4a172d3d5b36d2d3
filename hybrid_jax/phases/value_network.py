"""The value function of a phase: a head on the policy's own states, or a network of its own.

It is a group of parameters, ``<phase>/value``: ``{"head": …}``, and ``"model"`` too of a separate network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.classifier import Classifier
from hybrid_jax.models.folders.scorer import load_scorer, read_extra
from hybrid_jax.models.heads import init_value_head
from hybrid_jax.parallel.rules import Placement, under
from hybrid_jax.phases.references import check_alike, copied, decoder_beside
from hybrid_jax.training.state import RunState


def init_value(model: LanguageModel, policy: Params, *, separate: bool) -> dict[str, Any]:
    """A value head of zeros; a separate network also gets a trunk, a copy of the policy's."""
    head = {"head": init_value_head(model.width)}
    return {"model": jax.tree.map(jnp.copy, policy), **head} if separate else head


class SeparateStart:
    """Gives a separate value network the parameters that it starts from, at the first step of its phase.

    Args:
        group: its name in ``TrainState.params``.
        path: a reward model in a folder; None copies the policy as it is then.
        model: of the policy.
        placement: of the parameters.
    """

    def __init__(self, group: str, path: str | None, model: LanguageModel, placement: Placement):
        self._group, self._path, self._model = group, path, model
        self._copy = jax.jit(under(placement, copied))

    def __call__(self, state: RunState) -> dict[str, Params]:
        """All groups of parameters, that of the value started."""
        params, policy = state.train.params, state.train.params["model"]
        value = params[self._group]
        if self._path is None:
            return {**params, self._group: {**value, "model": self._copy(policy)}}
        read = read_value(self._path, self._model, policy, state.base)
        places = jax.tree.map(lambda x: x.sharding, value["head"])
        head = jax.device_put(read["head"], places)
        return {**params, self._group: {"model": self._copy(read["model"]), "head": head}}


def read_value(path: str, model: LanguageModel, policy: Params, base: Params) -> dict[str, Any]:
    """The trunk and the head of a value network out of a reward model: V starts as the normalised reward.

    A reward model that has several heads gives the value their mean.

    Raises:
        UserError: it is no reward model of a decoder, or of another shape than the policy.
    """
    decoder = decoder_beside(path, model, base)
    scorer, params = load_scorer(path)
    if not isinstance(scorer, Classifier):
        raise UserError(f"value_init {path} must be a reward model of a decoder, got {type(scorer).__name__}")
    trunk = {name: leaf for name, leaf in params.items() if name != "score"}
    # What only the next token is read from is kept as it is in the policy: a value never reads it.
    trunk = {**policy, **decoder.arranged(trunk)}
    check_alike(path, trunk, policy)
    return {"model": trunk, "head": _value_head(params["score"], read_extra(Path(path)))}


def _value_head(score: Params, extra: Mapping[str, Any]) -> Params:
    """``(mean over heads of (x · w + b) − mean) / std`` as one linear map."""
    normaliser = extra.get("normaliser") or {"mean": 0.0, "std": 1.0}
    kernel = jnp.mean(score["kernel"], axis=1, keepdims=True)
    bias = jnp.mean(score["bias"], keepdims=True) if "bias" in score else jnp.zeros((1,))
    return {
        "kernel": kernel / normaliser["std"],
        "bias": (bias - normaliser["mean"]) / normaliser["std"],
    }
