"""The losses of proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347).

Losses and metrics are Sums over the valid tokens. Masked items may hold anything and get no gradient.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.algorithms.returns import k3
from hybrid_jax.core.arrays import Sum, masked_variance


def clipped_policy_loss(
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    clip_range: float | Float[Array, ""],
) -> tuple[Sum, dict[str, Sum]]:
    """Σ max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) with ρ = π/π_old (equation 7, negated to be minimised).

    Args:
        log_probs: Of the policy being trained; the only argument that should carry a gradient.
        old_log_probs: Of the policy that sampled, at the same temperature.
        clip_range: ε > 0.

    Returns:
        The loss, and the metrics ``clip_fraction`` (tokens whose clipped term is the larger: they get no
        gradient), ``approx_kl`` (k3 of KL(π_old ‖ π), nats a token) and ``ratio`` (ρ).
    """
    log_probs, old_log_probs, advantages = _blank(mask, log_probs, old_log_probs, advantages)
    ratio = jnp.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    metrics = {
        "clip_fraction": Sum.of((clipped > plain).astype(jnp.float32), mask),
        "approx_kl": Sum.of(k3(old_log_probs, log_probs), mask),
        "ratio": Sum.of(ratio, mask),
    }
    return Sum.of(jnp.maximum(plain, clipped), mask), metrics


def clipped_value_loss(
    values: Float[Array, "B R"],
    old_values: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    clip_range: float | Float[Array, ""] | None,
) -> tuple[Sum, dict[str, Sum]]:
    """½ Σ max((V − G)², (clip(V, V_old − ε, V_old + ε) − G)²); plainly ½ Σ (V − G)² for ``clip_range`` None.

    The metric ``value_clip_fraction`` counts tokens whose clipped term is the larger: they get no gradient.
    """
    values, old_values, returns = _blank(mask, values, old_values, returns)
    plain = jnp.square(values - returns)
    clipped = plain
    if clip_range is not None:
        clipped = jnp.square(jnp.clip(values, old_values - clip_range, old_values + clip_range) - returns)
    metrics = {"value_clip_fraction": Sum.of((clipped > plain).astype(jnp.float32), mask)}
    return Sum.of(0.5 * jnp.maximum(plain, clipped), mask), metrics


def explained_variance(
    values: Float[Array, "B R"], returns: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> Float[Array, ""]:
    """1 − Var(G − V)/Var(G) over the valid tokens: 1 is perfect, 0 like a constant (or Var(G) = 0)."""
    variance = masked_variance(returns, mask)
    unexplained = masked_variance(returns - values, mask)
    return jnp.where(variance > 0, 1.0 - unexplained / jnp.where(variance > 0, variance, 1.0), 0.0)


def _blank(mask, *arrays):
    """Zeros where masked, before any arithmetic: a NaN there would pass even a later `where` backward."""
    return tuple(jnp.where(mask, array, 0.0) for array in arrays)
