"""REINFORCE (Williams 1992) with the mean score of the step as baseline: no value, one update a rollout."""

import jax.numpy as jnp

from hybrid_jax import Clipped, Count, OnPolicy, settings


@settings
class BatchMean:
    """A = R − mean R: what a response earned in all, less what the responses of the step earned on average."""

    needs_value = False
    min_group = 1

    def __call__(self, rewards, values, action_mask, group):
        """The advantage of every token of a response; there are no returns for a value to learn."""
        earned = jnp.where(action_mask, rewards, 0.0).sum(axis=1)
        return jnp.where(action_mask, (earned - earned.mean())[:, None], 0.0), None


@settings
class Reinforce(OnPolicy):
    """REINFORCE: at a ratio of 1 the gradient of the clipped objective is that of A log π."""

    epochs: Count = 1  # once a rollout is learned from, it is no longer of the policy
    whiten_advantages: bool = False

    @property
    def advantage(self):
        """The baseline."""
        return BatchMean()

    @property
    def objective(self):
        """A log π, as a ratio."""
        return Clipped()
