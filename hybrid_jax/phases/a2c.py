"""Advantage actor-critic (A2C): a critic, n-step returns, and one update a rollout.

    A, G = n-step returns of R and V, the KL to the reference in R (k1)
    L    = mean over tokens of −A log π + c_v ½ (V − G)² − c_H H

`hybrid_jax.phases.a3c` is the same with actors that do not wait for each other.

Source: Mnih et al. 2016 (arXiv 1602.01783), with synchronous actors: the responses of a rollout.
"""

from __future__ import annotations

from typing import Annotated

from hybrid_jax.algorithms.advantages import ADVANTAGES, Advantage
from hybrid_jax.algorithms.multistep import NStep
from hybrid_jax.algorithms.policy_gradient import OBJECTIVES, PolicyObjective, ScoreFunction
from hybrid_jax.core.ranges import Count, NonNegative, Positive, settings
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.training.phase import PHASES


@PHASES.register("a2c")
@settings
class A2C(PolicyGradient):
    """Settings of A2C."""

    advantage: Annotated[Advantage, ADVANTAGES] = NStep()  # how much better than expected each token was
    objective: Annotated[PolicyObjective, OBJECTIVES] = ScoreFunction()  # the loss of a token
    epochs: Count = 1  # times that the updates of a step read its rollout
    value_clip_range: Positive | None = None  # how far one step may move a value
    value_coef: NonNegative = 0.5  # of the value loss
    entropy_coef: NonNegative = 0.01  # of the exact entropy, which is rewarded
    whiten_advantages: bool = False  # scale them to mean 0 and standard deviation 1
