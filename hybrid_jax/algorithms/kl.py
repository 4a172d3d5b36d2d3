"""The distance to the reference: estimators of the KL, the penalty in the reward, and its strength β.

A control of β is its own config; its state is a scalar array, for the checkpoint and for `jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.core.ranges import NonNegative, Positive, settings
from hybrid_jax.core.registry import Registry

State = Float[Array, ""]


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


def k3_ratio(
    log_probs: Float[Array, "..."],
    reference_log_probs: Float[Array, "..."],
    old_log_probs: Float[Array, "..."],
) -> Float[Array, "..."]:
    """k3 · π/π_old: on samples of π_old it estimates KL(π ‖ π_ref), and as a loss it has that gradient."""
    return k3(log_probs, reference_log_probs) * jnp.exp(log_probs - old_log_probs)


# Where the KL to the references acts. In the reward (k1) a token answers for the KL of all that follows it, and
# the optimum is π* ∝ π_ref exp(r/β). In the loss it answers for its own alone, with Q the score to be expected:
#     k2, k3_ratio   π(a|s) ∝ π_ref(a|s) exp(Q(s, a)/β)             which is π* for responses of one token
#     k3             π(a|s) = β π_ref(a|s) / (λ(s) − Q(s, a))       the optimum of KL(π_ref ‖ π)
KLPenalty = Literal["reward", "k2", "k3", "k3_ratio"]
Estimator = Callable[[Array, Array, Array], Array]
KL_LOSSES: Mapping[str, Estimator] = {
    "k2": lambda log_probs, reference, old: k2(log_probs, reference),
    "k3": lambda log_probs, reference, old: k3(log_probs, reference),
    "k3_ratio": k3_ratio,
}


def kl_losses(
    estimator: Estimator,
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    reference_log_probs: Mapping[str, Float[Array, "B R"]],
    weights: Mapping[str, float],
    mask: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """Σ_i w_i · estimate of the KL to reference i, of each token; 0 where masked.

    Args:
        estimator: an entry of `KL_LOSSES`.
        log_probs: of the policy being trained; the only argument that should carry a gradient.
        old_log_probs: of the policy that sampled.
        reference_log_probs: of each reference, by name.
        weights: w_i ≥ 0 of each reference, the same names.
        mask: the tokens that the policy chose.
    """
    # Zeros before any arithmetic: a NaN where masked would pass even a later `where` backward.
    log_probs, old = (jnp.where(mask, x, 0.0) for x in (log_probs, jax.lax.stop_gradient(old_log_probs)))
    losses = (
        weights[name] * estimator(log_probs, jnp.where(mask, reference, 0.0), old)
        for name, reference in reference_log_probs.items()
    )
    return sum(losses, jnp.zeros_like(log_probs))


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
    chex.assert_equal_shape((log_probs, mask, *reference_log_probs.values()))
    chex.assert_shape(scores, log_probs.shape[:1])
    kl = sum(
        (weights[name] * k1(log_probs, reference_log_probs[name]) for name in weights),
        jnp.zeros_like(log_probs),
    )
    # By counting, since the last token of a response is the last one chosen, wherever the padding begins.
    tokens_left = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    is_last = mask & (tokens_left == 1)
    return jnp.where(mask, -kl_coef * kl, 0.0) + jnp.where(is_last, scores[:, None], 0.0)


class KLControl(Protocol):
    """A way to set β, an entry of `KL_CONTROLS`: its settings, and pure functions of its state."""

    def init(self) -> State:
        """The state before the first rollout."""
        ...

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """The state after ``num_samples`` responses whose KL, in nats a response, has that mean."""
        ...

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β for the next rollout."""
        ...


KL_CONTROLS: Registry[KLControl] = Registry("KL control")


@KL_CONTROLS.register("fixed")
@settings
class FixedKL:
    """β = ``coef``, always."""

    coef: NonNegative = 0.05  # β, the reward that a nat of KL costs

    def init(self) -> State:
        """β itself."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """The same state."""
        return state

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β."""
        return state


@KL_CONTROLS.register("adaptive")
@settings
class AdaptiveKL:
    """Proportional control towards a target KL (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

        e = clip(KL/target − 1, −0.2, 0.2)        β ← β (1 + e · min(n/horizon, 1))

    The bound on n/horizon keeps β positive for any batch; the paper's batches never reach it.
    """

    initial: Positive = 0.05  # β of the first step
    target: Positive = 6.0  # KL to hold, in nats summed over a response
    horizon: Positive = 10_000.0  # responses over which β follows; fewer react faster

    def init(self) -> State:
        """The initial β."""
        return jnp.asarray(self.initial, jnp.float32)

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """β moved towards the target."""
        error = jnp.clip(kl_sequence_mean / self.target - 1.0, -0.2, 0.2)
        return state * (1.0 + error * jnp.minimum(num_samples / self.horizon, 1.0))

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β."""
        return state
