"""Self-play preference optimisation: a regression of log-ratios on how often each answer of a group wins."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.algorithms.preference_losses import PREFERENCE_LOSSES
from hybrid_jax.core.ranges import Positive, settings

Group = Float[Array, "B K"]


@PREFERENCE_LOSSES.register("sppo")
@settings
class SPPO:
    """(log π(y) − log π_t(y) − (P̂(y ≻ π_t) − ½) / β)², a mean over the answers y of a group.

    Wu et al. 2024 (arXiv 2405.00675), eq. 3.6, with η = 1/β. y are samples of π_t, and P̂ is the share of the
    others that y beats. Its minimum is one step of multiplicative weights, up to the normaliser:
    π ∝ π_t exp(η P(y ≻ π_t)). For certain wins of pairs it is ``sppo_hard`` halved.

    Attributes:
        beta: 1/η, how closely the policy keeps to its reference; the paper has 0.001, to be met in one epoch.
    """

    beta: Positive = 0.1

    needs_reference: ClassVar[bool] = True
    learns_from: ClassVar[Literal["pairs", "answers", "groups"]] = "groups"
    sft_coef: ClassVar[float] = 0.0

    def __call__(self, policy: Group, reference: Group, wins: Group) -> Float[Array, "B"]:
        """The loss of each group.

        Args:
            policy: log π(y|x), summed over the tokens of each answer.
            reference: log π_t of the same, without gradient.
            wins: P̂ in [0, 1], see `win_rates`.
        """
        ratios = policy - jax.lax.stop_gradient(reference)
        return jnp.mean(jnp.square(ratios - (wins - 0.5) / self.beta), axis=1)


def win_rates(scores: Group) -> Group:
    """The share of the other answers of its group that each answer beats by its score; a tie is half a win.

    Where scores are noisy, as a person's judgement is, its mean over the others is P(y ≻ π_t).
    """
    ahead = 0.5 * (jnp.sign(scores[:, :, None] - scores[:, None, :]) + 1.0)
    return (ahead.sum(axis=2) - 0.5) / (scores.shape[1] - 1)
