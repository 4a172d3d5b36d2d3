"""On-policy distillation: the policy answers, and learns from a teacher how likely each of its tokens was.

    A_t = log π_teacher(y_t) − log π(y_t)
    L   = mean over tokens of max(−A ρ, −A clip(ρ, 1 ± 0.2))

With samples y of π this is the gradient of KL(π ‖ π_teacher) at each token, on texts that π writes itself: what
it will meet. The teacher is a reference, and nothing else is rewarded.

Sources: Agarwal et al. 2024 (arXiv 2306.13649); Gu et al. 2024 (2306.08543).
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage, Returns
from hybrid_jax.algorithms.kl import KL_CONTROLS, FixedKL, KLControl
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import Count, NonNegative, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.references import Reference
from hybrid_jax.phases.rollout_settings import NO_REWARD
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.training.phase import PHASES


@PHASES.register("distillation")
@settings
class Distillation(PolicyGradient):
    """Settings of on-policy distillation; ``references`` names the teacher."""

    reward: CompositeReward = NO_REWARD  # what a response earns beside; nothing
    references: dict[str, Reference] = field(default_factory=dict)  # the teacher, by a name of your own
    missing_eos_penalty: NonNegative | None = None  # taken from the score of a response that did not end
    advantage: Annotated[Advantage, ADVANTAGES] = Returns(discount=0.0)  # a token answers for itself alone
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # how a ratio is bounded
    kl_control: Annotated[KLControl, KL_CONTROLS] = FixedKL(1.0)  # of the KL to the teacher
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1

    needs_reward: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not self.references:
            raise ValueError("references must name a teacher, such as {teacher: {path: FOLDER}}, got none")
