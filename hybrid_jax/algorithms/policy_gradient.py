"""Objectives of policy gradients: what the log-probabilities of a rollout are to become, given its advantages.

Losses and metrics are Sums over the valid tokens. Masked items may hold anything and get no gradient.
"""

from __future__ import annotations

from typing import Protocol

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.algorithms.kl import k3
from hybrid_jax.core.arrays import Sum, masked_variance
from hybrid_jax.core.ranges import Positive, settings
from hybrid_jax.core.registry import Registry


class PolicyObjective(Protocol):
    """A loss of the policy: a frozen dataclass of settings, in `OBJECTIVES` or named ``my_module:Mine``."""

    def __call__(
        self,
        log_probs: Float[Array, "B R"],
        behaviour_log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Sum, dict[str, Sum]]:
        """The loss, to be minimised, and metrics by name; pure JAX.

        Args:
            log_probs: of the policy being trained; the only argument that should carry a gradient.
            behaviour_log_probs: of the policy that sampled, at the same temperature.
            advantages: of each token.
            action_mask: the tokens that the policy chose.
        """
        ...


OBJECTIVES: Registry[PolicyObjective] = Registry("policy objective")


@OBJECTIVES.register("clipped")
@settings
class Clipped:
    """The clipped surrogate of PPO: see `clipped_policy_loss`. At a ratio of 1 its gradient is REINFORCE's."""

    clip_range: Positive = 0.2  # ε

    def __call__(
        self,
        log_probs: Float[Array, "B R"],
        behaviour_log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Sum, dict[str, Sum]]:
        return clipped_policy_loss(
            log_probs,
            behaviour_log_probs,
            advantages,
            action_mask,
            clip_range=self.clip_range,
        )


def clipped_policy_loss(
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    clip_range: float | Float[Array, ""],
) -> tuple[Sum, dict[str, Sum]]:
    """Σ max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) with ρ = π/π_old.

    Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347, equation 7, negated to be minimised).

    Args:
        log_probs: Of the policy being trained; the only argument that should carry a gradient.
        old_log_probs: Of the policy that sampled, at the same temperature.
        clip_range: ε > 0.

    Returns:
        The loss, and the metric ``clip_fraction``: tokens whose clipped term is the larger, so that they get no
        gradient.
    """
    chex.assert_equal_shape((log_probs, old_log_probs, advantages, mask))
    log_probs, old_log_probs, advantages = _blank(mask, log_probs, old_log_probs, advantages)
    ratio = jnp.exp(log_probs - old_log_probs)
    # The larger of the two losses: what moved too far in the wrong direction is never clipped.
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    metrics = {"clip_fraction": Sum.of((clipped > plain).astype(jnp.float32), mask)}
    return Sum.of(jnp.maximum(plain, clipped), mask), metrics


def policy_change(
    log_probs: Float[Array, "B R"], old_log_probs: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> dict[str, Sum]:
    """How far a policy has moved: ``ratio``, ρ = π/π_old; ``approx_kl``, k3 of KL(π_old ‖ π), nats a token."""
    log_probs, old_log_probs = _blank(mask, log_probs, old_log_probs)
    return {
        "approx_kl": Sum.of(k3(old_log_probs, log_probs), mask),
        "ratio": Sum.of(jnp.exp(log_probs - old_log_probs), mask),
    }


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
    chex.assert_equal_shape((values, old_values, returns, mask))
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
    # The inner `where` keeps 0/0 out of a gradient, which the outer one would not.
    return jnp.where(variance > 0, 1.0 - unexplained / jnp.where(variance > 0, variance, 1.0), 0.0)


def _blank(mask, *arrays):
    """Zeros where masked, before any arithmetic: a NaN there would pass even a later `where` backward."""
    return tuple(jnp.where(mask, array, 0.0) for array in arrays)
