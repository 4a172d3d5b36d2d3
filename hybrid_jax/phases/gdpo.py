"""Group reward-decoupled normalisation: every part of the reward is normalised in its group, then the sum.

    s_b = Σ over parts of weight · (r_b − mean r) / std r over the answers to a prompt
    A_b = s_b / (std of s over the rollout + 1e-4)
    L   = mean over tokens of max(−A ρ, −A clip(ρ, 1 ± 0.2))

Where the sum is normalised, a part with large numbers hides the others.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient, PolicyGradientPhase
from hybrid_jax.phases.references import Reference
from hybrid_jax.training.phase import PHASES, Resources


@PHASES.register("gdpo")
@settings
class GDPO(PolicyGradient):
    """Settings of GDPO; every part of the reward has ``normalise: group``."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative("rollout")  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # how a ratio is bounded
    references: dict[str, Reference] = field(default_factory=dict)  # none: no KL is counted
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1

    def build(self, resources: Resources) -> PolicyGradientPhase:
        """The phase; every part of its reward must be normalised in its group."""
        if others := [name for name, part in self.reward.parts.items() if not part.is_in_groups]:
            raise UserError(
                f"phases.{resources.name}.reward.parts.{others[0]}.normalise must be group for gdpo"
            )
        return super().build(resources)
