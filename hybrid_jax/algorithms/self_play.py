"""Losses of a policy that plays against its earlier self, and the game that they solve.

A preference P[y, y'] is the probability that y beats y': P + Pᵀ = 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def spin_loss(
    real: Float[Array, "B"],
    real_opponent: Float[Array, "B"],
    generated: Float[Array, "B"],
    generated_opponent: Float[Array, "B"],
    *,
    beta: float = 0.1,
) -> Float[Array, "B"]:
    """−log σ(β [log π/π_t(y_real) − log π/π_t(y_generated)]).

    Chen et al. 2024 (arXiv:2401.01335), the logistic loss of SPIN: y_real is of the data, y_generated a sample
    of the opponent π_t, the policy of the iteration before. Where π_t is the distribution of the data and
    π = π_t, the expected gradient is exactly 0.

    Args:
        real: log π(y_real | x), summed over its tokens.
        real_opponent: log π_t of it, no gradient flows.
        generated: log π(y_generated | x).
        generated_opponent: log π_t of it.
        beta: β > 0.

    Returns:
        One loss a pair.
    """
    real_ratio = real - jax.lax.stop_gradient(real_opponent)
    generated_ratio = generated - jax.lax.stop_gradient(generated_opponent)
    return jax.nn.softplus(-beta * (real_ratio - generated_ratio))


def sppo_loss(
    log_probs: Float[Array, "B"],
    opponent_log_probs: Float[Array, "B"],
    win_rates: Float[Array, "B"],
    *,
    eta: float,
) -> Float[Array, "B"]:
    """(log π/π_t(y) − η (P̂(y ≻ π_t) − ½))²: the regression of SPPO (Wu et al. 2024, arXiv:2405.00675).

    Its minimum is one step of multiplicative weights, up to the normaliser: π ∝ π_t exp(η P̂).

    Args:
        log_probs: log π(y | x), summed over its tokens, of samples y of the opponent.
        opponent_log_probs: log π_t of them, no gradient flows.
        win_rates: P̂(y ≻ π_t) in [0, 1], see `win_rate`.
        eta: η > 0.

    Returns:
        One loss a sample.
    """
    ratio = log_probs - jax.lax.stop_gradient(opponent_log_probs)
    return jnp.square(ratio - eta * (win_rates - 0.5))


def win_rate(preference: Float[Array, "Y Y"], policy: Float[Array, "Y"]) -> Float[Array, "Y"]:
    """P(y ≻ π) = Σ_y' π(y') P[y, y'] of every y."""
    return preference @ policy


def multiplicative_weights(
    log_policy: Float[Array, "Y"], preference: Float[Array, "Y Y"], eta: float | Float[Array, ""]
) -> Float[Array, "Y"]:
    """log π_{t+1} of π_{t+1} ∝ π_t exp(η P(y ≻ π_t)): what `sppo_loss` approaches, exact.

    The *average* of the policies goes to the Nash equilibrium of the game (Freund and Schapire 1999); the last
    one need not.
    """
    return jax.nn.log_softmax(log_policy + eta * win_rate(preference, jnp.exp(log_policy)))


def preference_of_scores(
    scores: Float[Array, "..."], others: Float[Array, "..."], scale: float = 1.0
) -> Float[Array, "..."]:
    """P(y ≻ y') = σ((r(y) − r(y')) / scale): Bradley and Terry 1952."""
    return jax.nn.sigmoid((scores - others) / scale)
