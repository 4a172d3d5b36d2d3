"""Updates on the rows of a rollout: epochs of minibatches, each row once an epoch, in an order of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Rollout, TokenBatch
from hybrid_jax.models.base import LanguageModel
from hybrid_jax.parallel.rules import shard_rows
from hybrid_jax.training import nonfinite
from hybrid_jax.training.loss_scale import loss_scale_of
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective, update_state


def update_in_minibatches(
    config: Any,
    objective: Objective,
    state: TrainState,
    rows: Any,
    examples: TokenBatch | None,
    key: Array,
    rate: Array | float,
    *,
    groups: tuple[str, ...],
    optimizer_key: str,
    model: LanguageModel,
    target_kl: float | None = None,
) -> tuple[TrainState, dict[str, Array], dict[str, Array]]:
    """``epochs × minibatches`` optimizer steps.

    Args:
        config: ``epochs``, ``minibatches``, ``microbatches`` and the ``optimizer``.
        objective: the loss of the groups that train; its batch is some of the rows, and a part of the examples.
        state: its groups and their optimizer state are replaced.
        rows: leaves [B ...], of what was sampled.
        examples: ``minibatches`` equal parts of rows; each has its own part in every epoch.
        key: of the orders, and of the loss.
        rate: the learning rate.
        groups: those that train.
        optimizer_key: which optimizer state to use.
        model: says whether the loss is scaled.
        target_kl: the steps end where the metric ``approx_kl`` is above it; None never asks.

    Returns:
        The new state; the mean of each metric over the steps that were taken, and each as it was before the
        first of them. A minibatch in which no row counts takes none.
    """
    minibatches = config.minibatches
    order_key, loss_key = jax.random.split(key)
    orders = _epoch_orders(order_key, len(jax.tree.leaves(rows)[0]), config.epochs)
    orders = orders.reshape(config.epochs * minibatches, -1)
    parts = jnp.tile(jnp.arange(minibatches), config.epochs)

    def minibatch(carry, inputs):
        state, stopped = carry
        order, part, key = inputs
        batch = shard_rows((jax.tree.map(lambda x: x[order], rows), _part(examples, part, minibatches)))
        state, metrics, taken = update_state(
            objective,
            config.optimizer,
            state,
            batch,
            key,
            rate,
            optimizer_key=optimizer_key,
            groups=groups,
            microbatches=config.microbatches,
            scaling=loss_scale_of(model),
            accept=lambda metrics: ~(stopped | _too_far(target_kl, metrics)) & _teaches(objective, batch),
        )
        return (state, stopped | _too_far(target_kl, metrics)), (metrics, taken)

    # The optimizer states of other phases stay out of the loop, which would carry a copy of them.
    own = replace(state, opt_state={optimizer_key: state.opt_state[optimizer_key]})
    inputs = (orders, parts, jax.random.split(loss_key, len(parts)))
    (own, _), (metrics, taken) = jax.lax.scan(minibatch, (own, jnp.asarray(False)), inputs)
    state = replace(own, opt_state={**state.opt_state, **own.opt_state})
    bad = metrics.pop(nonfinite.METRIC)
    # A minibatch that met NaN counts too, so that the log shows it; one behind the target does not.
    counted = taken | (bad != nonfinite.FINE)
    means = {name: Sum.of(values, counted).mean() for name, values in metrics.items()}
    means |= {nonfinite.METRIC: bad[jnp.argmax(bad != nonfinite.FINE)], "updates": taken.sum()}
    return state, means, {name: values[0] for name, values in metrics.items()}


def whole_rollout(rollout: Rollout, key: Array) -> tuple[Rollout, Array]:
    """One epoch of one minibatch as `update_in_minibatches` reads it: the batch, and the key of its loss."""
    order_key, loss_key = jax.random.split(key)
    rows = _epoch_orders(order_key, rollout.tokens.shape[0], 1)[0]
    return shard_rows(jax.tree.map(lambda x: x[rows], rollout)), jax.random.split(loss_key, 1)[0]


def _too_far(target: float | None, metrics: Mapping[str, Array]) -> Array:
    """Tells whether the policy has moved as far as one step may."""
    return jnp.asarray(False) if target is None else metrics["approx_kl"] > target


def _teaches(objective: Objective, batch: Any) -> Array:
    """Tells whether any row of a minibatch counts: without one, the momentum alone would take a step."""
    weights = objective.weights(batch)
    return jnp.stack([(weights[name] > 0) & (coef != 0) for name, coef in objective.coefs.items()]).any()


def _epoch_orders(key: Array, rows: int, epochs: int) -> Int[Array, "epochs B"]:
    """A fresh order of the rows for every epoch."""
    return jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(key, epochs))


def _part(tree: Any, index: Array, parts: int) -> Any:
    """The ``index``-th of equal parts of the rows."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:])[index], tree)
