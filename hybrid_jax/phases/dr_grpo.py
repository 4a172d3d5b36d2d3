"""GRPO without its two biases: no division by the deviation of a group, nor by the length of a response.

    A_b = R_b − mean R over the answers to a prompt
    L   = Σ max(−A ρ, −A clip(ρ, 1 ± 0.2)) / (responses × max_new_tokens)

Source: Liu et al. 2025 (arXiv 2503.20783).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES


@PHASES.register("dr_grpo")
@settings
class DrGRPO(PolicyGradient):
    """Settings of Dr. GRPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative("none")  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # how a ratio is bounded
    aggregation: Aggregation = "budget"  # how the losses of tokens are added up, see `aggregation`
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
