"""Records that the stages of a rollout hand on, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_jax.core.batches import PromptBatch, Rollout, Samples


@dataclass(frozen=True)
class Answered:
    """A rollout whose texts have been read by the reward, and not yet compared with those before.

    Attributes:
        asked: the prompts, each as often as it was answered.
        samples: the answers.
        rollout: scored by the models.
        raw: the scores of each part of the reward; None where the device computes it.
        lengths: tokens of each answer on this process.
        complete: whether each ended by itself.
        following: answers to the next prompts, of rollouts ahead.
        cursor: of the prompts.
    """

    asked: PromptBatch
    samples: Samples
    rollout: Rollout
    raw: dict[str, Any] | None
    lengths: Any
    complete: Any
    following: Samples | None
    cursor: int


@dataclass(frozen=True)
class Played:
    """A rollout to learn from, and the changes that it makes to the state of the run.

    Attributes:
        rollout: rewarded.
        samples: of this step.
        reward_state: what the reward remembers.
        metrics: of host and reward, to log.
        waiting: what the next step finds answered, of rollouts ahead.
        cursors: to be kept.
    """

    rollout: Rollout
    samples: Samples
    reward_state: Any
    metrics: dict[str, Any]
    waiting: Samples | None
    cursors: Mapping[str, int]
