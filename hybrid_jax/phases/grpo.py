"""Group relative policy optimisation.

    A_b = (R_b − mean R) / (std R + 1e-4) over the answers to a prompt
    L   = mean over responses of their mean of max(−A ρ, −A clip(ρ, 1 ± 0.2)) + 0.04 · k3

A KL in the loss has another optimum than one in the reward (`hybrid_jax.algorithms.kl`): see ``kl_penalty``.
The mean of G answers includes the response's own, so that the gradient of the rewards is (G − 1)/G of the true
one: without the division by std, a KL in the loss has the optimum of β G/(G − 1).

Source: Shao et al. 2024 (arXiv 2402.03300).
"""

from __future__ import annotations

from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.group_advantages import GroupRelative
from hybrid_jax.algorithms.kl import KL_CONTROLS, FixedKL, KLControl, KLPenalty
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, Clipped, PolicyObjective
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.training.phase import PHASES


@PHASES.register("grpo")
@settings
class GRPO(PolicyGradient):
    """Settings of GRPO."""

    samples_per_prompt: BatchSize = 8  # answers to each prompt: a group
    advantage: Annotated[Advantage, ADVANTAGES] = GroupRelative()  # of a response, against the others
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # how a ratio is bounded
    aggregation: Aggregation = "sequence_mean"  # how the losses of tokens are added up, see `aggregation`
    kl_penalty: KLPenalty = "k3"  # in the loss, by this estimator
    kl_control: Annotated[KLControl, KL_CONTROLS] = FixedKL(0.04)  # how strongly references hold the policy
    epochs: Count = 1  # times that the updates of a step read its rollout
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
