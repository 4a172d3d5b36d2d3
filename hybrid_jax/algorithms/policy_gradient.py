"""Objectives of policy gradients: what the log-probabilities of a rollout are to become, given its advantages.

An objective gives the loss of each token; how tokens are added up is `hybrid_jax.algorithms.aggregation`'s.
Metrics are Sums over the valid tokens. Masked items may hold anything and get no gradient.
"""

from __future__ import annotations

from typing import Literal, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.algorithms.kl import k3
from hybrid_jax.core.arrays import Sum, masked_variance
from hybrid_jax.core.ranges import Positive, settings
from hybrid_jax.core.registry import Registry

RatioLevel = Literal["token", "sequence", "sequence_token"]


class PolicyObjective(Protocol):
    """A loss of the policy: a frozen dataclass of settings, in `OBJECTIVES` or named ``my_module:Mine``."""

    def __call__(
        self,
        log_ratios: Float[Array, "B R"],
        log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
        """The loss of each token, to be minimised, and metrics by name; pure JAX.

        Args:
            log_ratios: log π/π_old of each token, or of its sequence (`log_ratios`); 0 where masked. With
                ``log_probs`` the only argument that carries a gradient.
            log_probs: of the policy being trained; 0 where masked.
            advantages: of each token; 0 where masked.
            action_mask: the tokens that the policy chose.
        """
        ...


OBJECTIVES: Registry[PolicyObjective] = Registry("policy objective")


@OBJECTIVES.register("clipped")
@settings
class Clipped:
    """The clipped surrogate of PPO: see `clipped_losses`. At a ratio of 1 its gradient is REINFORCE's."""

    clip_range: Positive = 0.2  # ε: how far below 1 a ratio may fall and still gain, and how far above
    clip_range_high: Positive | None = None  # how far above, if not as far as below ("clip-higher")

    def __call__(
        self,
        log_ratios: Float[Array, "B R"],
        log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return clipped_losses(log_ratios, advantages, action_mask, low=self.clip_range, high=high)


@OBJECTIVES.register("truncated")
@settings
class Truncated:
    """−A · min(ρ, cap) · log π, the weight without gradient: every token keeps its gradient (CISPO).

    MiniMax 2025 (arXiv 2506.13585), without a lower bound.
    """

    cap: Positive = 1.2  # the largest weight of a token

    def __call__(
        self,
        log_ratios: Float[Array, "B R"],
        log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
        ratio = jax.lax.stop_gradient(jnp.exp(log_ratios))
        metrics = {"clip_fraction": Sum.of((ratio > self.cap).astype(jnp.float32), action_mask)}
        return -advantages * jnp.minimum(ratio, self.cap) * log_probs, metrics


@OBJECTIVES.register("soft")
@settings
class Soft:
    """−A · 4 σ(τ (ρ − 1)) / τ: a gate in place of a clip, whose gradient at ρ = 1 is that of A ρ (SAPO).

    Gao et al. 2025 (arXiv 2511.20347).
    """

    temperature: Positive = 1.0  # τ of tokens with a positive advantage: larger gates narrow
    temperature_negative: Positive = 1.05  # τ of all others

    def __call__(
        self,
        log_ratios: Float[Array, "B R"],
        log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
        temperature = jnp.where(advantages > 0, self.temperature, self.temperature_negative)
        gate = jax.nn.sigmoid(temperature * (jnp.exp(log_ratios) - 1)) * 4 / temperature
        return -advantages * gate, {}


@OBJECTIVES.register("score_function")
@settings
class ScoreFunction:
    """−A log π (Williams 1992): for responses of the policy itself, so with ``epochs: 1``."""

    def __call__(
        self,
        log_ratios: Float[Array, "B R"],
        log_probs: Float[Array, "B R"],
        advantages: Float[Array, "B R"],
        action_mask: Bool[Array, "B R"],
    ) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
        return -advantages * log_probs, {}


def token_losses(
    objective: PolicyObjective,
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    level: RatioLevel = "token",
) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
    """The losses of an objective with the ratios of a level; what is masked may be anything, even NaN.

    Args:
        objective: an entry of `OBJECTIVES`.
        log_probs: of the policy being trained; the only argument that should carry a gradient.
        old_log_probs: of the policy that sampled, at the same temperature.
        advantages: of each token.
        mask: the tokens that the policy chose.
        level: see `log_ratios`.
    """
    chex.assert_equal_shape((log_probs, old_log_probs, advantages, mask))
    log_probs, old_log_probs, advantages = _blank(mask, log_probs, old_log_probs, advantages)
    return objective(log_ratios(log_probs, old_log_probs, mask, level), log_probs, advantages, mask)


def log_ratios(
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    level: RatioLevel = "token",
) -> Float[Array, "B R"]:
    """log ρ of each token, 0 where masked.

        token            log π(y_t) − log π_old(y_t)
        sequence         its mean over the tokens of the response, for all of them (GSPO)
        sequence_token   that mean as the value, the token's own gradient (GSPO-token)

    Zheng et al. 2025 (arXiv 2507.18071).
    """
    of_token = jnp.where(mask, log_probs - old_log_probs, 0.0)
    if level == "token":
        return of_token
    of_sequence = of_token.sum(axis=1, keepdims=True) / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    if level == "sequence_token":
        of_sequence = jax.lax.stop_gradient(of_sequence - of_token) + of_token
    return jnp.where(mask, of_sequence, 0.0)


def clipped_losses(
    log_ratios: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    low: float | Float[Array, ""],
    high: float | Float[Array, ""],
) -> tuple[Float[Array, "B R"], dict[str, Sum]]:
    """max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)) of each token.

    Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347, equation 7, negated to be minimised);
    two bounds: Yu et al. 2025 (2503.14476).

    Returns:
        The losses, and the metric ``clip_fraction``: tokens whose clipped term is the larger, so that they get
        no gradient.
    """
    ratio = jnp.exp(log_ratios)
    # The larger of the two losses: what moved too far in the wrong direction is never clipped.
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - low, 1 + high)
    metrics = {"clip_fraction": Sum.of((clipped > plain).astype(jnp.float32), mask)}
    return jnp.maximum(plain, clipped), metrics


def clipped_policy_loss(
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    clip_range: float,
) -> tuple[Sum, dict[str, Sum]]:
    """Σ max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)) over the valid tokens: `clipped_losses` of a batch, added up."""
    losses, metrics = token_losses(Clipped(clip_range), log_probs, old_log_probs, advantages, mask)
    return Sum.of(losses, mask), metrics


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
