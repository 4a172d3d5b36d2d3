"""A user whom another language model plays: it goes on with a conversation that a row of data begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hybrid_jax.core.batches import Message
from hybrid_jax.core.ranges import settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step


@ENVIRONMENTS.register("user")
@settings(kw_only=True)
class User:
    """A user played by a reference of the phase, which may be a copy of the policy or a folder.

    A row begins: what stands before its first answer is the opening. From then on the model says what the user
    says. It reads the conversation with the roles exchanged, behind ``instruction``. The environment itself
    pays nothing: what an answer earns is the reward of the phase, such as `relevance` and `engagement`.

    Attributes:
        answered_by: the name of the reference, such as ``{path: FOLDER, weight: 0}``, which holds nothing back.
        instruction: the first message that the model reads.
        end: a text of the user's with these letters in it, upper case or lower, is the last one; so is an empty
            one. None lets the limits of the conversation end it.
    """

    reads_rows: ClassVar[bool] = True

    answered_by: str
    instruction: str = "You are a person who talks with an assistant. Say what that person says next."
    end: str | None = "bye"

    def make(self, answer_fn: AnswerFn | None = None) -> PlayedUser:
        """A user of its own for one conversation."""
        if answer_fn is None:
            raise ValueError("a user needs a model that plays it")
        return PlayedUser(self, answer_fn)


class PlayedUser:
    """The user of one conversation."""

    def __init__(self, settings: User, answer_fn: AnswerFn):
        self._settings, self._answer_fn = settings, answer_fn
        self._heard: list[Message] = [{"role": "user", "content": settings.instruction}]

    def reset(self, seed: int, **row: Any) -> Sequence[Message]:
        """Begins with the messages of the row up to its first answer, or with its prompt."""
        messages = [dict(message) for message in row.get("messages") or ()]
        first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
        opening = messages[:first] or [{"role": "user", "content": row["prompt"]}]
        self._heard += [{"role": "assistant", "content": m["content"]} for m in opening if m["role"] == "user"]
        return opening

    def step(self, text: str) -> Step:
        """Lets the model answer."""
        self._heard.append({"role": "user", "content": text})
        said = self._answer_fn(self._heard)
        self._heard.append({"role": "assistant", "content": said})
        end = self._settings.end
        over = not said.strip() or (end is not None and end.lower() in said.lower())
        return Step([{"role": "user", "content": said}] if said.strip() else [], 0.0, over)
