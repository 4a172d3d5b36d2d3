"""From scores to advantages: per-token rewards, generalised advantage estimation, whitening, KL estimators.

Conventions of every [B R] array: item ``t`` belongs to response token ``t``; ``values[b, t]`` is the value of
the state before it, ``rewards[b, t]`` is received after it. A mask may have holes (the user's turns of a
dialogue); masked items may hold anything and come out as 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.core.arrays import masked_mean, masked_sum


def token_rewards(
    scores: Float[Array, "B"],
    log_probs: Float[Array, "B R"],
    reference_log_probs: Mapping[str, Float[Array, "B R"]],
    weights: Mapping[str, float],
    kl_coef: float | Float[Array, ""],
    mask: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """R_t = −β Σ_i w_i (log π(y_t) − log π_i(y_t)) + [t is the last response token] · score.

    The single-sample KL (k1) sits in the reward, so the optimum is π* ∝ Π_i π_i^{w_i/Σw} · exp(score/(β Σw))
    (Ziegler et al. 2019, arXiv 1909.08593, equation 2, for one reference of weight 1). The weights count as
    given, they are not normalised.

    Args:
        scores: One number a response; lost for a row without a valid token.
        log_probs: Of the policy that sampled.
        reference_log_probs: Of each reference, by name.
        weights: w_i ≥ 0 of each reference, the same names.
        kl_coef: β ≥ 0.
        mask: The response tokens, the end-of-sequence token included.

    Raises:
        ValueError: The names of the weights are not those of the references.
    """
    if set(weights) != set(reference_log_probs):
        raise ValueError(
            f"weights must name the references {sorted(reference_log_probs)}, got {sorted(weights)}"
        )
    kl = sum(
        (weights[name] * k1(log_probs, reference_log_probs[name]) for name in weights),
        jnp.zeros_like(log_probs),
    )
    tokens_left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    is_last = mask & (tokens_left == 1)
    return jnp.where(mask, -kl_coef * kl, 0.0) + jnp.where(is_last, scores[:, None], 0.0)


def gae(
    rewards: Float[Array, "*batch R"],
    values: Float[Array, "*batch R"],
    mask: Bool[Array, "*batch R"],
    *,
    discount: float | Float[Array, ""] = 1.0,
    trace: float | Float[Array, ""] = 0.95,
) -> tuple[Float[Array, "*batch R"], Float[Array, "*batch R"]]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).

        δ_t = R_t + γ V_{t'} − V_t        A_t = δ_t + γ λ A_{t'}        G_t = A_t + V_t

    where t' is the next *valid* token: A and V are carried across masked ones, which cost no discount. After
    the last valid token the value is 0 (the response has ended, by choice or by length).

    Args:
        discount: γ in [0, 1]; below 1 it shrinks what long responses earn.
        trace: λ in [0, 1].

    Returns:
        Advantages A (not whitened) and returns G, both 0 where masked.
    """

    def step(later, now):
        later_advantage, later_value = later
        reward, value, valid = now
        advantage = reward + discount * later_value - value + discount * trace * later_advantage
        return (jnp.where(valid, advantage, later_advantage), jnp.where(valid, value, later_value)), advantage

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask))
    nothing = jnp.zeros(values.shape[:-1], jnp.result_type(rewards, values))
    _, advantages = jax.lax.scan(step, (nothing, nothing), time_first, reverse=True)
    advantages = jnp.where(mask, jnp.moveaxis(advantages, 0, -1), 0.0)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def whiten(x: Float[Array, "..."], mask: Bool[Array, "..."], *, shift_mean: bool = True) -> Float[Array, "..."]:
    """Scales the valid items, all together, to standard deviation 1 and mean 0; masked items become 0.

    The variance has Bessel's correction (divided by n − 1). Without ``shift_mean`` the mean stays where it
    was, for rewards, whose sign matters. One item, or equal ones, give 0 (or their mean).
    """
    mean = masked_mean(x, mask)
    centred = jnp.where(mask, x - mean, 0.0)
    variance = masked_sum(jnp.square(centred), mask) / jnp.maximum(jnp.sum(mask) - 1, 1)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def k1(log_probs: Float[Array, "..."], reference_log_probs: Float[Array, "..."]) -> Float[Array, "..."]:
    """log π − log π_ref: with samples of π an unbiased estimate of KL(π ‖ π_ref), of either sign."""
    return log_probs - reference_log_probs


def k2(log_probs: Float[Array, "..."], reference_log_probs: Float[Array, "..."]) -> Float[Array, "..."]:
    """½ (log π − log π_ref)² ≥ 0: biased, but its gradient is that of the KL, so it is the one for a loss."""
    return 0.5 * jnp.square(log_probs - reference_log_probs)


def k3(log_probs: Float[Array, "..."], reference_log_probs: Float[Array, "..."]) -> Float[Array, "..."]:
    """ρ − 1 − log ρ ≥ 0 with ρ = π_ref/π: unbiased and of low variance, for logging.

    As a loss its gradient is that of KL(π_ref ‖ π) (J. Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio = reference_log_probs - log_probs
    return jnp.expm1(log_ratio) - log_ratio
