"""Conversations without their oldest turns: cut between turns, never within one.

A turn begins with a message of the user and reaches to the next one: with the answer, calls of tools and their
results. Messages of the system at the start belong to no turn and stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import Conversation, encode_conversations
from hybrid_jax.data.tokenizer import Tokenizer

Messages = Sequence[Message]


@dataclass(frozen=True)
class Turns:
    """A conversation in turns, and what the system says before them."""

    head: tuple[Message, ...]
    turns: tuple[tuple[Message, ...], ...]

    @staticmethod
    def of(messages: Messages) -> Turns:
        """Cuts a conversation before each message of the user that follows another role."""
        start = next(
            (i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages)
        )
        turns: list[list[Message]] = []
        for before, message in zip([None, *messages[start:]], messages[start:], strict=False):
            if before is None or (message["role"] == "user" and before["role"] != "user"):
                turns.append([])
            turns[-1].append(message)
        if len(turns) > 1 and turns[0][0]["role"] != "user":  # a greeting belongs to the first question
            turns[:2] = [turns[0] + turns[1]]
        return Turns(tuple(messages[:start]), tuple(map(tuple, turns)))

    def part(self, first: int, last: int) -> list[Message]:
        """The messages of the turns ``[first, last)``, behind those of the system."""
        return [*self.head, *chain.from_iterable(self.turns[first:last])]

    def learned(self, last: int) -> int:
        """The number of turns, of the first ``last``, up to the last one with an answer to learn."""
        while last and not any(
            message["role"] == "assistant" and message.get("train") is not False
            for message in self.turns[last - 1]
        ):
            last -= 1
        return last


def one_turn_each(messages: Messages, count: int) -> list[list[Message]]:
    """A conversation for each answered turn, of that turn and those before it, ``count`` in all.

    Only the answers of its last turn are learned. Without an answer to learn there is one, of the last turns.
    """
    turns = Turns.of(messages)
    answered = [last for last in range(1, len(turns.turns) + 1) if turns.learned(last) == last]
    rows = []
    for last in answered or [len(turns.turns)]:
        rows.append(turns.part(max(last - count, 0), last))
        earlier = len(rows[-1]) - len(turns.turns[last - 1])
        rows[-1][:earlier] = [
            {**message, "train": False} if message["role"] == "assistant" else message
            for message in rows[-1][:earlier]
        ]
    return rows


def fitting_question(messages: Messages, encode: Callable[[Messages], list[int]], most: int) -> list[int]:
    """The tokens of a question without its oldest turns, as few as must go for it to fit.

    Args:
        messages: of which the last is to be answered.
        encode: makes their tokens.
        most: tokens at most; the last turn alone may have more.
    """
    turns = Turns.of(messages)
    search, last = _Search(len(turns.turns)), len(turns.turns)
    while (first := search.next) is not None:
        tokens = encode(turns.part(first, last))
        search.tell(tokens if len(tokens) <= most else None)
    return search.found or encode(turns.part(last - 1, last))


def fitting_conversations(
    rows: Sequence[tuple[Messages, Mapping[str, Any]]], places: Sequence[str], tokenizer: Tokenizer, most: int
) -> tuple[list[list[Conversation]], int]:
    """Encodes conversations in parts of ``most`` tokens, cut between turns.

    A part is as many of the last turns as fit, with the system's messages; those before them are the next part.
    So each answer is learned once, behind what its part still holds.

    Args:
        rows: messages and variables of each conversation.
        places: of the rows, for errors.
        tokenizer: whose template renders them.
        most: tokens of a part at most.

    Returns:
        The parts of each conversation, in order, and the number of turns that alone are longer, left out.

    Raises:
        UserError: a part cannot be encoded; it names the row.
    """
    parts: list[list[Conversation]] = [[] for _ in rows]
    too_long = 0
    windows = [_Window(number, Turns.of(messages)) for number, (messages, _) in enumerate(rows)]
    while windows := [window for window in windows if window.last]:
        asked = [(window.asked, rows[window.number][1]) for window in windows]
        encoded = encode_conversations(asked, tokenizer)
        for window in windows:
            try:
                found = next(encoded)
            except UserError as error:
                raise UserError(f"{places[window.number]}: {error}") from error
            window.search.tell(found if max(len(one.tokens) for one in found) <= most else None)
            if window.search.next is None:
                too_long += window.search.found is None
                parts[window.number][:0] = window.search.found or []
                window.go_back()
    return parts, too_long


class _Search:
    """Bisection for the fewest turns to drop; at least one is kept."""

    def __init__(self, turns: int):
        self._low, self._high = 0, turns
        self.found: Any = None

    @property
    def next(self) -> int | None:
        """How many to drop, to be told whether that fits; None at the end."""
        return (self._low + self._high) // 2 if self._low < self._high else None

    @property
    def dropped(self) -> int:
        """How many are dropped at the end; all where nothing fits."""
        return self._low

    def tell(self, found: Any) -> None:
        """Gives what fits, or None where it does not."""
        tried = (self._low + self._high) // 2
        if found is None:
            self._low = tried + 1
        else:
            self._high, self.found = tried, found


@dataclass
class _Window:
    """The last turns of a conversation that fit, of those before ``last``."""

    number: int
    turns: Turns
    last: int = field(init=False)
    search: _Search = field(init=False)

    def __post_init__(self):
        self._begin(len(self.turns.turns))

    @property
    def asked(self) -> list[Message]:
        first = self.search.next
        assert first is not None
        return self.turns.part(first, self.last)

    def go_back(self) -> None:
        """Goes on with the turns before those that fit; a last turn that alone is too long is passed over."""
        self._begin(min(self.search.dropped, self.last - 1))

    def _begin(self, last: int) -> None:
        self.last = self.turns.learned(last)
        self.search = _Search(self.last)
