"""Parameters of other models for PPO: references out of folders, and a value network out of a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.classifier import Classifier
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families.family import flatten
from hybrid_jax.models.folders import hf
from hybrid_jax.models.folders.scorer import load_scorer, read_extra


def read_like(path: str, model: LanguageModel, policy: Params, base: Params) -> Params:
    """The parameters of a Hugging Face folder, arranged like those of the policy.

    Raises:
        UserError: the policy trains adapters, or the model in the folder is of another shape.
    """
    decoder = _decoder(path, model, base)
    params = decoder.arranged(hf.load_pretrained(path)[1])
    _check_alike(path, params, policy)
    return params


def read_value(path: str, model: LanguageModel, policy: Params, base: Params) -> dict[str, Any]:
    """The trunk and the head of a value network out of a reward model: V starts as the normalised reward.

    A reward model that has several heads gives the value their mean.

    Raises:
        UserError: it is no reward model of a decoder, or of another shape than the policy.
    """
    decoder = _decoder(path, model, base)
    scorer, params = load_scorer(path)
    if not isinstance(scorer, Classifier):
        raise UserError(f"value_init {path} must be a reward model of a decoder, got {type(scorer).__name__}")
    trunk = {name: leaf for name, leaf in params.items() if name != "score"}
    # What only the next token is read from is kept as it is in the policy: a value never reads it.
    trunk = {**policy, **decoder.arranged(trunk)}
    _check_alike(path, trunk, policy)
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


def _decoder(path: str, model: LanguageModel, base: Params) -> Decoder:
    if base or not isinstance(model, Decoder):
        kind = "adapters" if base else type(model).__name__
        raise UserError(f"a model from {path} can stand beside a decoder that trains whole, got {kind}")
    return model


def _check_alike(path: str, params: Params, policy: Params) -> None:
    there, here = ({name: leaf.shape for name, leaf in flatten(tree).items()} for tree in (params, policy))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            shapes = f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} in the policy"
            raise UserError(f"{path} must hold a model of the policy's shape: {shapes}")
