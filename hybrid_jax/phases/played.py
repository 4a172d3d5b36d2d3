"""Records that the stages of a rollout hand on, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_jax.core.batches import PromptBatch, Rollout, Samples


@dataclass(frozen=True)
class ReadTexts:
    """Answers as the reward has read them, those of this process.

    Attributes:
        raw: the scores of each part of the reward.
        lengths: tokens of each answer.
        complete: whether each ended by itself.
    """

    raw: Mapping[str, Any]
    lengths: Any
    complete: Any


@dataclass(frozen=True)
class Answered:
    """A rollout whose texts have been read by the reward, and not yet compared with those before.

    Attributes:
        asked: the prompts, each as often as it was answered.
        samples: the answers.
        rollout: scored by the models.
        rivals: other answers to the same prompts, scored by the references.
        texts: the answers, then those of each opponent among the rivals; none where the device computes the
            reward.
        following: answers to the next prompts, of rollouts ahead.
        cursor: of the prompts.
    """

    asked: PromptBatch
    samples: Samples
    rollout: Rollout
    rivals: Sequence[Rollout]
    texts: Sequence[ReadTexts]
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
        rivals: other answers to the same prompts; an opponent's are rewarded, too.
    """

    rollout: Rollout
    samples: Samples
    reward_state: Any
    metrics: dict[str, Any]
    waiting: Samples | None
    cursors: Mapping[str, int]
    rivals: tuple[Rollout, ...] = ()
