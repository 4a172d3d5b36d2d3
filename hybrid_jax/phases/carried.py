"""Truncated backpropagation through time (Williams & Peng 1990): a state that goes on from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybrid_jax.algorithms.supervised import next_token_targets
from hybrid_jax.core.arrays import Sum, segment_positions
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.models.base import Params
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.recurrent.cell import Flow, State
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.models.scoring import target_log_probs
from hybrid_jax.parallel.rules import shard_params
from hybrid_jax.phases.supervised import SupervisedPhase
from hybrid_jax.training.phase import PhaseInit
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Groups, update


class CarriedPhase(SupervisedPhase):
    """A phase that reads a `ContinuousStream` of rows, each from the state that the row before has left.

    The state is no function of the parameters: a gradient goes back to the beginning of the row, at most k2
    tokens, on average k2 − (k1 − 1) / 2. It is kept in ``TrainState.extra``, so that checkpoints hold it.
    """

    def init(
        self, params: Mapping[str, Params], key: Array, made: Mapping[str, Params] | None = None
    ) -> PhaseInit:
        """`SupervisedPhase.init`, with the state of rows that have read nothing."""
        added, model = super().init(params, key, made), self.resources.model
        return replace(added, extra={**added.extra, self._memory: model.start(self.config.batch_size)})

    @property
    def _memory(self) -> str:
        return f"{self.name}/memory"

    def _learn(
        self, base: Params, references: Groups, state: TrainState, batch: TokenBatch, key: Array, rate: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step, as a pure function of the state."""
        before, config = state.extra[self._memory], self.config
        dropout_key = key if config.dropout else None

        def loss(params: Params):
            term, after = carried_loss(self.resources.model, params, batch, before, config.stride, dropout_key)
            return term.mean(), after

        (mean, after), grads = jax.value_and_grad(loss, has_aux=True)(state.params["model"])
        grads = shard_params({"model": grads}, param_axes)
        state, metrics, _ = update(
            config.optimizer, state, grads, {"loss": mean}, rate, optimizer_key=self.optimizer_key
        )
        state = replace(state, extra={**state.extra, self._memory: after})
        return shard_params(state, param_axes), metrics


def carried_loss(
    model: RecurrentModel,
    params: Params,
    batch: TokenBatch,
    state: State,
    stride: int | None = None,
    key: Array | None = None,
) -> tuple[Sum, Any]:
    """The loss of a batch that goes on from ``state``, and the state behind its first ``stride`` tokens.

    Args:
        model: that has a state.
        params: of the model.
        batch: of a `ContinuousStream`: a sequence with the number 1 goes on, others begin anew.
        state: behind the tokens before the rows; a constant.
        stride: k1; None: all tokens that a row reads, one less than its length.
        key: of dropout; None is without.

    Returns:
        Σ −log π over the targets, in nats, and the state from which the next batch goes on.
    """
    tokens, segments = batch.tokens[:, :-1], batch.segment_ids[:, :-1]
    real = segments > 0
    flow = Flow(real.T, (real & (segments > 1) & (segment_positions(segments) == 0)).T)
    first = stride or tokens.shape[1]
    keys: Any = (None, None) if key is None else jax.random.split(key)
    parts = [jax.tree.map(lambda x, s=s: x[s], flow) for s in (slice(first), slice(first, None))]
    hidden, after = model.read(params, tokens[:, :first], jax.lax.stop_gradient(state), parts[0], keys[0])
    if first < tokens.shape[1]:
        rest, _ = model.read(params, tokens[:, first:], after, parts[1], keys[1])
        hidden = jnp.concatenate([hidden, rest], axis=1)
    targets, mask = next_token_targets(batch.tokens, batch.loss_mask)
    return Sum.of(-target_log_probs(model, params, hidden, targets)[0], mask), jax.lax.stop_gradient(after)
