"""Phases that train a head: what of the run they read and change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Parameters
from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import Params
from hybrid_jax.models.heads import GROUP
from hybrid_jax.models.scorer import TextScorer, text_trunk
from hybrid_jax.phases.scorer_reader import ScorerReader
from hybrid_jax.phases.supervised import Stream, Supervised, SupervisedPhase
from hybrid_jax.training.phase import PhaseInit, Resources
from hybrid_jax.training.state import RunState
from hybrid_jax.training.update import Objective


@settings
class HeadSettings(Supervised):
    """Settings that every phase has which trains a head."""

    head: str | None = None  # its name among the heads of the run; None takes the only one


class HeadPhase(SupervisedPhase):
    """Steps that train a head, and the trunk with it where the head says so.

    Subclasses measure the head (`evaluate`) and say how to read its numbers (`extra`). The arguments are those
    of `SupervisedPhase`; the loss of the objective is given the whole parameters of the `TextScorer`.
    """

    def __init__(
        self,
        config: Any,
        resources: Resources,
        *,
        stream: Stream | None,
        objective: Objective,
        shapes: Callable[[], Any],
        read_rows: int,
        length: int | None,
    ):
        self.head = head_name(config, resources)
        self.scorer = scorer_of(config, resources)
        self.heads = (self.head,)
        trained = (GROUP + self.head,)
        super().__init__(
            config,
            resources,
            stream=stream,
            objective=objective,
            shapes=shapes,
            groups=("model", *trained) if self.scorer.head.trains_trunk else trained,
        )
        keeps_features = not resources.trunk_trains
        self.reader = ScorerReader(self.scorer, resources.placement, read_rows, length, keeps_features)

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        """Adds the head, unless another phase that trains it has, to what `SupervisedPhase.init` gives."""
        group = GROUP + self.head
        if group in params:  # another phase trains it, too
            return super().init(params, key)
        number = sorted(self.resources.heads).index(self.head)
        key = jax.random.fold_in(jax.random.fold_in(key, Parameters.HEADS), number)
        made = {group: self.scorer.head.init(key, self.scorer.trunk.num_features)}
        return super().init({**params, **made}, key, made)

    def extra(self, state: RunState) -> dict[str, Any]:
        """The data saved beside the exported head, as JSON: how to read texts, calibrate or normalise."""
        return {}

    def params_of(self, state: RunState) -> Params:
        """The parameters of trunk and head, as the scorer reads them."""
        return scorer_params(self.head, {**state.train.params, "model": state.policy})


def head_name(config: Any, resources: Resources) -> str:
    """The name of the head that a phase trains.

    Raises:
        UserError: there is no such head, or the phase does not say which.
    """
    names, where = sorted(resources.heads), f"phases.{resources.name}"
    if config.head is None and len(names) == 1:
        return names[0]
    if config.head not in names:
        got = "none" if config.head is None else repr(config.head)
        raise UserError(
            f"{where}.head must name a head of the run, got {got}; heads: {', '.join(names) or 'none'}"
        )
    return config.head


def scorer_of(config: Any, resources: Resources) -> TextScorer:
    """The trunk of the run with the head that a phase trains."""
    return TextScorer(text_trunk(resources.model), resources.heads[head_name(config, resources)])


def scorer_params(head: str, params: Mapping[str, Params]) -> Params:
    """Those of a `TextScorer` out of the groups of a run."""
    return {"trunk": params["model"], "head": params[GROUP + head]}


def read_head(scorer: TextScorer, params: Params, batch: Any, dropout_key: Array | None) -> Array:
    """The numbers of every row of a batch, float32 [..., Y]: off its features, where it has them."""
    rows = batch.tokens if batch.features is None else batch.features
    if batch.features is not None:
        scores = scorer.read(params, rows.reshape(-1, rows.shape[-1]), dropout_key=dropout_key)
    else:
        flat = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask)]
        scores = scorer.apply(scorer.cast(params), *flat, dropout_key=dropout_key)
    return scores.astype(jnp.float32).reshape(*rows.shape[:-1], -1)
