"""One-step-asynchronous rollouts: the next prompts are answered before this step's update, not after it.

    in order      answer y_t ~ π_t, reward it, update π_t to π_t+1; answer y_t+1 ~ π_t+1
    ahead         answer y_t+1 ~ π_t while y_t is rewarded, update π_t to π_t+1

The host rewards responses that were sampled a step ago, so it works while the device samples and updates, and
neither waits for the other. The price is that y_t comes from π_t−1. Its log-probabilities are those of that
policy, so ratios start away from 1 and the clipped objective corrects for the update between; the penalty, too,
is for the KL of the policy that sampled. The metric ``staleness`` says how many updates lie between (0 or 1).

What was sampled ahead is part of the run's state. It is used only if the next step is one of the same phase:
after another phase the policy would be any number of updates away, so the prompts are answered anew. Where the
scheduler says that another phase comes next, nothing is sampled ahead; if a metric decides, it may be in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.param_axes import AHEAD
from hybrid_jax.parallel.rules import Placement, shard_rows, under
from hybrid_jax.phases.rollout_settings import RolloutSettings
from hybrid_jax.training.state import RunState, ScheduleState, TrainState


class RolloutAhead:
    """Keeps the responses of one phase for its next step, in ``TrainState.extra``."""

    def __init__(self, phase: str, placement: Placement, following: Callable[[ScheduleState], str | None]):
        self._phase, self._following = phase, following
        self._key = f"{phase}/{AHEAD}"
        self._split = jax.jit(under(placement, shard_rows))

    def init(self, settings: RolloutSettings) -> dict[str, Samples]:
        """The entries that the phase adds to ``TrainState.extra``."""
        return {self._key: Samples.empty(settings.rows, settings.sampler.max_new_tokens)}

    def is_wanted(self, state: RunState) -> bool:
        """Tells whether the step after this one may be of the same phase."""
        return self._following(state.schedule) in (self._phase, None)

    def staleness(self, state: RunState) -> int:
        """Updates between the policy that answers the prompts of this step and the one that it finds."""
        answered = state.cursors.get(self._key)  # the first of the prompts whose answers wait
        return int(state.schedule.last == self._phase and answered == state.cursors.get(self._phase, 0))

    def of(self, state: RunState) -> Samples | None:
        """The responses to the prompts of this step, if they were sampled ahead."""
        return self.waiting(state) if self.staleness(state) else None

    def waiting(self, state: RunState) -> Samples:
        """The responses that were sampled ahead last, whether they are of use or not."""
        return state.train.extra[self._key]

    def cursor(self, next_prompts: int) -> dict[str, int]:
        """The mark of waiting responses: they answer the prompts from ``next_prompts`` on."""
        return {self._key: next_prompts}

    def settled(self, samples: Samples) -> Samples:
        """Places samples as in a fresh state; call it before the update is started, not to wait for it."""
        if samples.log_probs is None:  # of a sampler that chooses; a state has the same arrays at every step
            samples = replace(samples, log_probs=jnp.zeros(samples.tokens.shape))
        return self._split(samples)

    def without(self, train: TrainState) -> TrainState:
        """The state for an update, which would delete responses that are still read."""
        return replace(train, extra={name: x for name, x in train.extra.items() if name != self._key})

    def keep(self, train: TrainState, samples: Samples) -> TrainState:
        """Adds ``samples`` for the next step to the state."""
        return replace(train, extra={**train.extra, self._key: samples})
