"""Clipped weights in place of clipped updates: no token loses its gradient.

    A_b = (R_b − mean R) / (std R + 1e-4) over the answers to a prompt
    L   = mean over tokens of −A · min(ρ, 1.2) · log π, the weight without gradient

The paper does not say its upper bound; 1.2 is a common choice. It bears old rollouts well.

Source: MiniMax 2025 (arXiv 2506.13585).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, PolicyObjective, Truncated
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES


@PHASES.register("cispo")
@settings
class CISPO(PolicyGradient):
    """Settings of CISPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative()  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Truncated()  # how a ratio is bounded
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
