"""Gradients through a gradient step: meta-learning, and reward weights that are learnt from what they lead to.

A loss is a function of parameters (any pytree) and of data, to a scalar. The inner backward pass is
differentiated again, exactly. Three ways to get numbers that look right and are not:

- A ``stop_gradient`` between the weights and the new parameters, on the advantages for example: the gradient
  is exactly 0. What changes rewards must reach the inner loss as a traced value.
- The same batch inside and outside: the weights learn to flatter that batch. Give the outer loss fresh data.
- Half of the derivative sold as the whole: the gradient without the second order is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = TypeVar("Params")
Weights = TypeVar("Weights")
Task = TypeVar("Task")
Rate = float | Float[Array, ""]


def inner_step(loss: Callable[[Params], Float[Array, ""]], params: Params, rate: Rate) -> Params:
    """θ′ = θ − α ∇L(θ): one step of gradient descent, differentiable in all that ``loss`` holds.

    Args:
        loss: L, to be made small.
        params: θ.
        rate: α.
    """
    return _stepped(params, jax.grad(loss)(params), rate)


def meta_gradient(
    inner_loss: Callable[[Params, Task], Float[Array, ""]],
    outer_loss: Callable[[Params, Task], Float[Array, ""]],
    params: Params,
    tasks: Task,
    rate: Rate,
    *,
    first_order: bool = False,
) -> Params:
    """1/N Σ_i d/dθ L_outer(θ − α ∇L_inner(θ, i), i): where to start so that one step goes far.

    Finn, Abbeel and Levine 2017 (arXiv:1703.03400), with one inner step.

    Args:
        inner_loss: What a task is adapted with, of parameters and one task.
        outer_loss: What the adapted parameters are judged by, of them and the same task; it should read data
            of the task that ``inner_loss`` does not.
        params: θ.
        tasks: A pytree with leaves [N ...], one row a task.
        rate: α.
        first_order: Leaves out the derivative of the inner gradient (FOMAML): cheaper, and
            biased by a factor I − α ∇²L_inner.

    Returns:
        The gradient of the mean outer loss, shaped like ``params``.
    """

    def adapted(params: Params, task: Task) -> Float[Array, ""]:
        gradient = jax.grad(inner_loss)(params, task)
        gradient = jax.lax.stop_gradient(gradient) if first_order else gradient
        return outer_loss(_stepped(params, gradient, rate), task)

    def mean_loss(params: Params) -> Float[Array, ""]:
        return jax.vmap(adapted, in_axes=(None, 0))(params, tasks).mean()

    return jax.grad(mean_loss)(params)


def weight_gradient(
    inner_loss: Callable[[Params, Weights], Float[Array, ""]],
    outer_loss: Callable[[Params], Float[Array, ""]],
    params: Params,
    weights: Weights,
    rate: Rate,
) -> Weights:
    """dL_outer(θ′(w))/dw with θ′(w) = θ − α ∇_θ L_inner(θ, w): the reward weights that help the true objective.

    Zheng, Oh and Singh 2018 (arXiv:1804.06459), who ascend returns where this descends losses. By the chain
    rule it is −α ∇_w∇_θ L_inner · ∇L_outer(θ′): a weight is raised as far as the step that it causes is one
    that the outer loss would have taken too.

    Where data are sampled, the outer loss is a policy-gradient surrogate on answers of θ′ itself, its
    advantages from the true objective: its value does not matter, its gradient does. Answers of another policy
    need the importance ratio. The weights have to learn while the policy still explores: an answer that it no
    longer gives tells them nothing.

    Args:
        inner_loss: The loss of the policy under the rewards that ``weights`` combine.
        outer_loss: The loss by the true objective, on data that the inner one has not seen.
        params: θ.
        weights: w, any pytree.
        rate: α > 0; at 0 the gradient is 0.

    Returns:
        The gradient, shaped like ``weights``; to be subtracted.
    """

    def after_the_step(weights: Weights) -> Float[Array, ""]:
        return outer_loss(inner_step(lambda params: inner_loss(params, weights), params, rate))

    return jax.grad(after_the_step)(weights)


def _stepped(params: Params, gradient: Params, rate: Rate) -> Params:
    return jax.tree.map(lambda p, g: jnp.asarray(p) - rate * g, params, gradient)
