"""Settings of conversations, and the record of one: what was said, what it earned, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from hybrid_jax.core.batches import Message
from hybrid_jax.core.ranges import BatchSize, Count, Natural, Seconds, settings


@settings
class ConversationSettings:
    """How a policy talks with an environment."""

    max_turns: Count = 8  # answers of the policy; after the last one a conversation is broken off
    max_tokens: Count = 256  # of a conversation behind its opening: answers and replies
    max_reply_tokens: Count = 64  # of a reply; the text of a longer one is cut at its end
    num_held_out: Natural = 16  # of every evaluation, the same each time, with seeds that training never has
    slots: BatchSize | None = None  # conversations at a time; one that ends makes room; null: all
    timeout_seconds: Seconds = 60.0  # for one reply of the environment
    retries: Natural = 0  # how often a conversation whose environment failed is brought back to its last answer
    on_failure: Literal["drop", "error"] = "drop"  # drop: it is left out of the update; error: the run ends
    rewriting_template: Literal["error", "append"] = (
        "error"  # a chat template that rewrites earlier turns: refuse it, or keep what was sampled
    )


@dataclass
class Turn:
    """An answer of the policy, and the reply to it."""

    text: str
    start: int  # its first token, counted from the end of the opening
    end: int  # behind its last token
    complete: bool  # ended by itself, not by its length
    reward: float = 0.0  # of the environment
    replies: Sequence[Message] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """One conversation.

    Attributes:
        opening: the messages that the policy answered first.
        tokens: of the opening.
        turns: in order.
        said: the tokens behind the opening, as they came, int32; those of the policy are in its turns.
        log_probs: of those tokens; 0 of those that were read.
        end: ``terminated`` by the environment, ``truncated`` by it or by a limit, ``failed``, or yet ``open``.
        failure: of the environment, in one line.
    """

    opening: Sequence[Message] = ()
    tokens: Sequence[int] = ()
    turns: list[Turn] = field(default_factory=list)
    said: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    log_probs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    end: Literal["open", "terminated", "truncated", "failed"] = "open"
    failure: str | None = None

    @property
    def reward(self) -> float:
        """All that the environment gave."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def record(self) -> dict[str, Any]:
        """Everything that was said, as JSON, with the reward of every answer."""
        said = [dict(message) for message in self.opening]
        for turn in self.turns:
            said.append({"role": "assistant", "content": turn.text, "reward": turn.reward})
            said += [dict(message) for message in turn.replies]
        return {"conversation": said, "score": self.reward, "end": self.end}

    @property
    def chosen(self) -> np.ndarray:
        """Tells of each token behind the opening whether the policy chose it."""
        mask = np.zeros(len(self.said), bool)
        for turn in self.turns:
            mask[turn.start : turn.end] = True
        return mask
