"""Group sequence policy optimisation: one ratio for a whole response.

    A_b = (R_b − mean R) / (std R + 1e-4) over the answers to a prompt
    ρ_b = (π(y_b) / π_old(y_b))^(1 / tokens)
    L   = mean over responses of max(−A ρ, −A clip(ρ, 1 − 3e-4, 1 + 4e-4))

``ratio: sequence_token`` is the form in which tokens may have advantages of their own.

Source: Zheng et al. 2025 (arXiv 2507.18071).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective, RatioLevel
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES


@PHASES.register("gspo")
@settings
class GSPO(PolicyGradient):
    """Settings of GSPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative()  # of a response, against the others
    ratio: RatioLevel = "sequence"  # whose probabilities a ratio compares, see `log_ratios`
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped(3e-4, 4e-4)  # how a ratio is bounded
    aggregation: Aggregation = "sequence_mean"  # how the losses of tokens are added up, see `aggregation`
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
