"""REINFORCE, with the mean of the rollout as baseline.

    A_t = Σ_t' ≥ t R_t' − mean over the tokens of the rollout, the KL to the reference in R (k1)
    L   = mean over tokens of −A log π

A baseline that runs along is ``reward.baseline: {kind: ema}``, with ``advantage.baseline: none``.

Source: Williams 1992.
"""

from __future__ import annotations

from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage, Returns
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, PolicyObjective, ScoreFunction
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.training.phase import PHASES


@PHASES.register("reinforce")
@settings
class REINFORCE(PolicyGradient):
    """Settings of REINFORCE."""

    advantage: Annotated[Advantage, ADVANTAGES] = Returns(baseline="rollout")  # what is earned from a token on
    objective: Annotated[PolicyObjective, OBJECTIVES] = ScoreFunction()  # the loss of a token
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
