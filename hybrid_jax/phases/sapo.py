"""Soft adaptive policy optimisation: a gate in place of the clip.

    A_b = (R_b − mean R) / (std R + 1e-4) over the answers to a prompt
    L   = mean over responses of their mean of −A · 4 σ(τ (ρ − 1)) / τ, τ = 1 for A > 0, else 1.05

Source: Gao et al. 2025 (arXiv 2511.20347).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, PolicyObjective, Soft
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES


@PHASES.register("sapo")
@settings
class SAPO(PolicyGradient):
    """Settings of SAPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative()  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Soft()  # how a ratio is bounded
    aggregation: Aggregation = "sequence_mean"  # how the losses of tokens are added up, see `aggregation`
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
