"""Gradients and parameter updates: the one place that divides a loss.

A loss function returns sums over valid tokens, a weight function says over how many tokens of the whole batch.
So neither microbatches, nor padding, nor the number of devices changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybrid_jax.core.arrays import Sum
from hybrid_jax.models.base import Params
from hybrid_jax.training.optimizers import Optimizer, clip_by_global_norm

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


def gradients(
    objective: Objective, params: Groups, batch: Any, key: Array, microbatches: int = 1
) -> tuple[Groups, dict[str, Array]]:
    """Gradient of the objective on ``batch`` (leaves [B ...]), read in equal ``microbatches``.

    Returns the gradient and the mean of each term and metric over the whole batch.
    """
    weights = {name: jnp.maximum(weight, 1) for name, weight in objective.weights(batch).items()}

    def part(params: Groups, batch: Any, key: Array):
        terms, metrics = objective.loss(params, batch, key)
        loss = sum(objective.coefs[name] * term.total / weights[name] for name, term in terms.items())
        return loss, {**terms, **metrics}

    grad = jax.grad(part, has_aux=True)
    if microbatches == 1:
        grads, sums = grad(params, batch, key)
    else:
        grads, sums = _accumulate(grad, params, batch, key, microbatches)
    return grads, {name: value.mean() for name, value in sums.items()}


def apply_gradients(
    optimizer: Optimizer, params: Groups, opt_state: dict[str, Any], grads: Groups, rate: Array | float
) -> tuple[Groups, dict[str, Any], Array]:
    """One optimizer step on each group in ``grads``; other groups stay as they are.

    The norm is taken and clipped over all groups together; it is returned as it was before clipping.
    """
    grads, norm = clip_by_global_norm(grads, optimizer.max_grad_norm)
    params, opt_state = dict(params), dict(opt_state)
    transform = optimizer.transform()
    for group, grad in grads.items():
        updates, opt_state[group] = transform.update(grad, opt_state[group], params[group])
        params[group] = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params[group], updates)
    return params, opt_state, norm


def _accumulate(grad: Callable, params: Groups, batch: Any, key: Array, microbatches: int):
    parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
    keys = jax.random.split(key, microbatches)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, part_and_key):
        return jax.tree.map(jnp.add, total, grad(params, *part_and_key)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]
