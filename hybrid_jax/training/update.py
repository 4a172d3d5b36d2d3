"""Gradients and parameter updates: the one place that divides a loss.

A loss function returns sums over valid tokens, a weight function says over how many tokens of the whole batch.
So neither microbatches, nor padding, nor the number of devices changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybrid_jax.core.arrays import Sum
from hybrid_jax.models.base import Params
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import shard_params, shard_rows
from hybrid_jax.training import loss_scale, nonfinite
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import DynamicLossScale
from hybrid_jax.training.optimizers import Optimizer, clip_by_global_norm, global_norm, sums_of_squares
from hybrid_jax.training.state import TrainState

Groups = dict[str, Params]
Terms = dict[str, Sum]


@dataclass(frozen=True)
class Objective:
    """A weighted sum of mean losses: ``Σ_k coefs[k] · total_k / weight_k``.

    ``loss(params, batch, key) -> (terms, metrics)`` gives the totals on a part of the batch and
    ``weights(batch)`` the weight of each term on the whole batch, which no parameter can change.
    """

    loss: Callable[[Groups, Any, Array], tuple[Terms, Terms]]
    weights: Callable[[Any], Mapping[str, Any]]
    coefs: Mapping[str, float]


def update_state(
    objective: Objective,
    optimizer: Optimizer,
    state: TrainState,
    batch: Any,
    key: Array,
    rate: Array | float,
    *,
    optimizer_key: str,
    groups: Sequence[str] = ("model",),
    microbatches: int = 1,
    scaling: DynamicLossScale | None = None,
    accept: Callable[[Mapping[str, Array]], Array] | None = None,
) -> tuple[TrainState, dict[str, Array], Array]:
    """The gradient of one objective (`gradients`), and the guarded update by it (`update`).

    Args:
        objective: the loss of those groups.
        optimizer, rate, optimizer_key, scaling, accept: see `update`.
        state: of the run.
        batch: leaves [B ...], read in equal ``microbatches``.
        key: of the loss.
        groups: those that train.
        microbatches: parts in which the batch is read; the gradient is the same.
    """
    trained = {group: state.params[group] for group in groups}
    scale = state.extra[loss_scale.STATE].scale if scaling else None
    grads, metrics = gradients(objective, trained, batch, key, microbatches, scale)
    losses = [name for name in objective.coefs if name in metrics]
    return update(
        optimizer,
        state,
        grads,
        metrics,
        rate,
        optimizer_key=optimizer_key,
        losses=losses,
        scaling=scaling,
        accept=accept,
    )


def update(
    optimizer: Optimizer,
    state: TrainState,
    grads: Groups,
    metrics: Mapping[str, Array],
    rate: Array | float,
    *,
    optimizer_key: str,
    losses: Sequence[str] = ("loss",),
    scaling: DynamicLossScale | None = None,
    accept: Callable[[Mapping[str, Array]], Array] | None = None,
) -> tuple[TrainState, dict[str, Array], Array]:
    """One optimizer step, left out where loss or gradient is not finite; wherever the gradient is from.

    Args:
        optimizer: turns the gradient into a direction, which is subtracted ``rate`` times.
        state: its ``params`` and ``opt_state[optimizer_key]`` are replaced, with ``scaling`` its state too.
        grads: of the groups that train; the others stay as they are.
        metrics: what belongs to the gradient, the terms of the loss among it.
        rate: the learning rate.
        optimizer_key: which optimizer state to use.
        losses: the metrics that must be finite.
        scaling: of the loss, for a model that computes in float16.
        accept: whether to take the step at all, from the ``metrics``.

    Returns:
        The new state; the metrics with ``grad_norm`` before clipping, ``nonfinite`` (see `first_nonfinite`; an
        overflow that a smaller loss scale may mend is none) and ``loss_scale``, if there is one; and whether
        the step was taken.
    """
    metrics = dict(metrics)
    squares = sums_of_squares(grads)
    terms = jnp.stack([metrics[name] for name in losses])
    bad = nonfinite.first_nonfinite(state.params, squares, terms)
    finite = bad == nonfinite.FINE
    # Decided on the device: the host hears of it with the metrics, and does not wait for it.
    taken = finite if accept is None else finite & accept(metrics)

    def step(old: tuple[Groups, dict[str, Any]], grads: Groups) -> tuple[Groups, dict[str, Any]]:
        params, opt_state, _ = apply_gradients(optimizer, *old, grads, rate, squares)
        return params, opt_state

    # A branch, since choosing between old and new arrays would keep a copy of the parameters.
    old = state.params, state.opt_state[optimizer_key]
    params, opt_state = jax.lax.cond(taken, step, lambda old, grads: old, old, grads)
    metrics |= {"grad_norm": global_norm(_trunk_first(squares)), nonfinite.METRIC: bad}
    extra = state.extra
    if scaling is not None:
        scale_state = extra[loss_scale.STATE]
        overflow = jnp.isfinite(terms).all() & scaling.can_shrink(scale_state)
        metrics |= {
            nonfinite.METRIC: jnp.where(overflow, nonfinite.FINE, bad),
            loss_scale.STATE: scale_state.scale,
        }
        extra = {**extra, loss_scale.STATE: scaling.update(scale_state, finite)}
    opt_states = {**state.opt_state, optimizer_key: opt_state}
    return replace(state, params=params, opt_state=opt_states, extra=extra), metrics, taken


def gradients(
    objective: Objective,
    params: Groups,
    batch: Any,
    key: Array,
    microbatches: int = 1,
    scale: Array | None = None,
) -> tuple[Groups, dict[str, Array]]:
    """Gradient of the objective on ``batch`` (leaves [B ...]), read in equal ``microbatches``.

    With a ``scale`` the loss is multiplied by it and the gradient divided by it, in float32.

    Returns the gradient and the mean of each term and metric over the whole batch.
    """
    # A batch without a valid token has total 0, and its loss is 0, not NaN. Weights below 1 are weights, too.
    weights = {name: jnp.where(weight > 0, weight, 1) for name, weight in objective.weights(batch).items()}

    def part(params: Groups, batch: Any, key: Array):
        terms, metrics = objective.loss(params, batch, key)
        loss = sum(objective.coefs[name] * term.total / weights[name] for name, term in terms.items())
        return loss if scale is None else loss * scale, {**terms, **metrics}

    def grad(params: Groups, batch: Any, key: Array):
        grads, sums = jax.grad(part, has_aux=True)(params, batch, key)
        return shard_params(grads, param_axes), sums  # each device adds up its own part of them

    if microbatches == 1:
        grads, sums = grad(params, batch, key)
    else:
        grads, sums = _accumulate(grad, params, batch, key, microbatches)
    if scale is not None:  # in float32, where what was scaled up to survive float16 does not vanish again
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
    return grads, {name: value.mean() for name, value in sums.items()}


def apply_gradients(
    optimizer: Optimizer,
    params: Groups,
    opt_state: dict[str, Any],
    grads: Groups,
    rate: Array | float,
    squares: Any = None,
) -> tuple[Groups, dict[str, Any], Array]:
    """One optimizer step on each group in ``grads``; other groups stay as they are.

    The norm is taken and clipped over all groups together, from the ``squares`` of `sums_of_squares` where they
    are known already; it is returned as it was before clipping.
    """
    squares = _trunk_first(sums_of_squares(grads) if squares is None else squares)
    grads, norm = clip_by_global_norm(grads, optimizer.max_grad_norm, squares)
    params, opt_state = dict(params), dict(opt_state)
    transform = layer_by_layer(optimizer.transform())
    for group, grad in grads.items():
        updates, opt_state[group] = transform.update(grad, opt_state[group], params[group])
        params[group] = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params[group], updates)
    return params, opt_state, norm


def _trunk_first(squares: Mapping[str, Any]) -> list[Any]:
    """The order of a sum over groups, so that it does not depend on what heads and phases are called."""
    return [squares[name] for name in sorted(squares, key=lambda name: (name != "model", name))]


def _accumulate(grad: Callable, params: Groups, batch: Any, key: Array, microbatches: int):
    # Every microbatch takes its share of the rows of each device, so none has to travel.
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, microbatches)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, part_and_key):
        part, key = part_and_key
        return jax.tree.map(jnp.add, total, grad(params, shard_rows(part), key)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]
