"""REINFORCE with the other answers to a prompt as baseline: the critic-free method to begin with.

    A_b = R_b − mean of R of the other answers, the KL to the reference in R (k1)
    L   = mean over tokens of max(−A ρ, −A clip(ρ, 1 − 0.2, 1 + 0.28))

Source: Ahmadian et al. 2024 (arXiv 2402.14740). Their own loss is ``objective: score_function``, ``aggregation:
sequence_sum``; the mean over tokens and the wider upper bound are those of Yu et al. 2025 (2503.14476).
"""

from __future__ import annotations

from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.group_advantages import LeaveOneOut
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.training.phase import PHASES


@PHASES.register("rloo")
@settings
class RLOO(PolicyGradient):
    """Settings of RLOO."""

    samples_per_prompt: BatchSize = 4  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = LeaveOneOut()  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped(0.2, 0.28)  # how a ratio is bounded
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
