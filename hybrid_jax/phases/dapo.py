"""Decoupled clip and dynamic sampling: GRPO for long answers that are right or wrong.

    A_b = (R_b − mean R) / (std R + 1e-4) over the answers to a prompt
    L   = mean over tokens of max(−A ρ, −A clip(ρ, 1 − 0.2, 1 + 0.28)), without a KL

Prompts whose answers all earn the same are replaced within the step (`hybrid_jax.phases.refill`).

Source: Yu et al. 2025 (arXiv 2503.14476).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES


@PHASES.register("dapo")
@settings
class DAPO(PolicyGradient):
    """Settings of DAPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    refill_rounds: Count | None = 10  # batches of prompts that a step asks at most, see `refill`
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative()  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped(0.2, 0.28)  # how a ratio is bounded
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
