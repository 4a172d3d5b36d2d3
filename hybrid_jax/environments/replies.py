"""Checks what an environment gives back, which may be code of a user's: nothing malformed goes further."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.data.messages import check_messages, without_nulls

MOST_MESSAGES = 1024  # at once
LARGEST_REWARD = 3.4e38  # float32


class BadReply(Exception):
    """An environment has returned something that its contract does not allow; the text says what."""


@dataclass(frozen=True)
class Said:
    """A checked reply of an environment; ``cut`` counts the letters that were left out of it."""

    messages: tuple[Message, ...]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, float] = field(default_factory=dict, compare=False)
    cut: int = 0


def said_at_reset(value: Any, most_letters: int) -> Said:
    """Checks what `reset` has returned: messages, at least one, the last of which is not the policy's.

    Raises:
        BadReply: it is something else.
    """
    messages, cut = _messages(value, "reset", most_letters)
    if not messages:
        raise BadReply("reset returned no message to answer")
    if messages[-1]["role"] == "assistant":
        raise BadReply("the last message of reset is of the assistant, which is the policy itself")
    return Said(messages, cut=cut)


def said_at_step(value: Any, most_letters: int) -> Said:
    """Checks the five items that `step` has returned.

    Raises:
        BadReply: they are something else.
    """
    if not isinstance(value, tuple | list) or len(value) != 5:
        got = f"{len(value)} items" if isinstance(value, tuple | list) else shown(value)
        raise BadReply(f"step must return (messages, reward, terminated, truncated, info), got {got}")
    given, reward, terminated, truncated, info = value
    messages, cut = _messages(given, "step", most_letters)
    if any(message["role"] == "assistant" for message in messages):
        raise BadReply("step returned a message of the assistant, which is the policy itself")
    terminated, truncated = _truth(terminated, "terminated"), _truth(truncated, "truncated")
    if not (messages or terminated or truncated):
        raise BadReply("step returned no message to answer, though the conversation goes on")
    return Said(messages, _reward(reward), terminated, truncated, _info(info), cut)


def tools_of(environment: Any) -> tuple[Mapping[str, Any], ...]:
    """Reads the JSON schemas of an environment's tools; none where it has no ``tools``.

    Raises:
        BadReply: they are no list of objects.
    """
    tools = getattr(environment, "tools", None) or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadReply(f"tools must be a list of JSON schemas, got {shown(tools)}")
    return tuple(without_nulls(tools, "tools"))


def _messages(value: Any, source: str, most_letters: int) -> tuple[tuple[Message, ...], int]:
    """The messages with at most so many letters together, and how many more there were."""
    if not isinstance(value, list | tuple):
        raise BadReply(f"the messages of {source} must be a list, got {shown(value)}")
    if len(value) > MOST_MESSAGES:
        raise BadReply(f"{source} returned {len(value):,} messages at once, at most {MOST_MESSAGES:,}")
    try:
        messages = check_messages(value, source) if value else ()
    except UserError as error:
        raise BadReply(str(error)) from error
    left, kept, total = most_letters, [], 0
    for message in messages:
        text = message["content"].encode("utf-8", "replace").decode()  # half characters are no UTF-8
        cut = max(len(text) - left, 0)
        if cut:
            message = {**message, "content": f"{text[:left]}[cut: {cut:,} letters]"}
        elif text != message["content"]:
            message = {**message, "content": text}
        left, total = max(left - len(text), 0), total + cut
        kept.append(message)
    return tuple(kept), total


def _reward(value: Any) -> float:
    number = value.item() if getattr(value, "shape", None) == () else value  # of numpy or JAX
    if isinstance(number, numbers.Real) and not isinstance(number, bool):
        reward = float(number)
        if math.isfinite(reward) and abs(reward) <= LARGEST_REWARD:
            return reward
    raise BadReply(f"the reward must be a finite number, got {shown(value)}")


def _truth(value: Any, name: str) -> bool:
    truth = value.item() if getattr(value, "shape", None) == () else value
    if not isinstance(truth, bool):
        raise BadReply(f"{name} must be True or False, got {shown(value)}")
    return truth


def _info(value: Any) -> dict[str, float]:
    """The finite numbers in it, which can be logged."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadReply(f"info must be a dict, got {shown(value)}")
    return {
        str(name): float(number)
        for name, number in value.items()
        if isinstance(number, numbers.Real) and math.isfinite(number)
    }


def first_difference(one: Sequence[Said], other: Sequence[Said]) -> int | None:
    """The number of the first reply that differs, in more than its info; None where all are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
