"""Proximal policy optimisation of a language model: a policy gradient with the defaults of PPO.

    A, G = GAE(R, V)
    L    = mean max(−A ρ, −A clip(ρ, 1 ± ε))
         + c_v ½ mean max((V − G)², (clip(V, V_old ± ε_v) − G)²) − c_H mean H

Sources: Schulman et al. 2017 (arXiv 1707.06347), Ziegler et al. 2019 (1909.08593), Ouyang et al. 2022
(2203.02155).
"""

from __future__ import annotations

from hybrid_jax.algorithms.advantages import GAE, Unit
from hybrid_jax.algorithms.policy_gradient import Clipped
from hybrid_jax.core.ranges import Positive, Share, settings
from hybrid_jax.phases.policy_gradient import OnPolicy
from hybrid_jax.training.phase import PHASES


@PHASES.register("ppo")
@settings
class PPO(OnPolicy):
    """Settings of PPO; the defaults are those that work for most language models."""

    discount: Share = 1.0  # γ of the advantages
    trace: Share = 0.95  # λ of the advantages
    discount_per: Unit = "token"  # what γ and λ count; turn: they act between turns of a conversation alone
    clip_range: Positive = 0.2  # ε: how far a ratio may move and still gain

    @property
    def advantage(self) -> GAE:
        """Generalised advantage estimation."""
        return GAE(self.discount, self.trace, self.discount_per)

    @property
    def objective(self) -> Clipped:
        """The clipped surrogate."""
        return Clipped(self.clip_range)
