"""Kahneman-Tversky optimisation: a loss of single answers, each of them good or bad."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.algorithms.preference_losses import PREFERENCE_LOSSES
from hybrid_jax.core.ranges import NonNegative, Positive, settings


@PREFERENCE_LOSSES.register("kto")
@settings
class KTO:
    """λ [1 − σ(±(r − β z))], + for good answers: Ethayarajh et al. 2024 (arXiv 2402.01306).

    r = β (log π(y|x) − log π_ref(y|x)), and z estimates KL(π ‖ π_ref) by the mean log-ratio of prompts with the
    answers of others, at least 0 and without gradient. A row is one answer and whether it is good.

    Attributes:
        beta: how closely the policy keeps to its reference.
        desirable_weight: λ of good answers.
        undesirable_weight: λ of bad ones: choose both so that the classes weigh alike, between 1 : 1 and 4 : 3.
    """

    beta: Positive = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    needs_reference: ClassVar[bool] = True
    learns_from: ClassVar[Literal["pairs", "answers", "groups"]] = "answers"
    sft_coef: ClassVar[float] = 0.0

    def __call__(
        self, ratios: Float[Array, "B"], desirable: Bool[Array, "B"], baseline: Float[Array, "*B"]
    ) -> Float[Array, "B"]:
        """The loss of each answer.

        Args:
            ratios: log π(y|x) − log π_ref(y|x), summed over tokens.
            desirable: whether the answer is good.
            baseline: z, see `kto_baseline`.
        """
        sign = jnp.where(desirable, 1.0, -1.0)
        weight = jnp.where(desirable, self.desirable_weight, self.undesirable_weight)
        return weight * jax.nn.sigmoid(-sign * self.beta * (ratios - baseline))


def kto_baseline(mismatched: Float[Array, "B"]) -> Float[Array, ""]:
    """z = max(0, mean of log π(y'|x) − log π_ref(y'|x)), y' the answer of another row; no gradient."""
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(mismatched), 0.0))
