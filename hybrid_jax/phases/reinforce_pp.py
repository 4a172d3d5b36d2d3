"""REINFORCE++: the clipped surrogate on returns that are whitened over the whole rollout.

    A_t = whitened Σ_t' ≥ t R_t', the KL to the reference in R (k1)
    L   = mean over responses of their mean of max(−A ρ, −A clip(ρ, 1 ± 0.2))

Source: Hu 2025 (arXiv 2501.03262).
"""

from __future__ import annotations

from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage, Returns
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.training.phase import PHASES


@PHASES.register("reinforce_pp")
@settings
class ReinforcePP(PolicyGradient):
    """Settings of REINFORCE++."""

    advantage: Annotated[Advantage, ADVANTAGES] = Returns()  # what is earned from a token on
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # how a ratio is bounded
    aggregation: Aggregation = "sequence_mean"  # how the losses of tokens are added up, see `aggregation`
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = True  # scale them to mean 0 and standard deviation 1
