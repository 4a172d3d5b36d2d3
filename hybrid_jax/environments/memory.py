"""Worlds that cannot be solved without memory: what is asked at the end was told at the start alone.

    memory_length           memory_size              t_maze
    user        1           user        0 1 1 0      user        left
    assistant   0           assistant   0            assistant   on
    user        wait        user        wait         user        hall
    assistant   0           assistant   0            assistant   on
    user        which?      user        3?           user        fork
    assistant   1           assistant   1            assistant   left
    user        right       user        right        user        right

The right answer earns 1 and a wrong one -1, so a guess among n earns 2 / n - 1. The first two are those of
bsuite (Osband et al. 2020, arXiv:1908.03568) in words; the third is that of Bakker 2001 (Reinforcement learning
with long short-term memory), in which a wrong step ends the walk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Interval

from hybrid_jax.core.batches import Message
from hybrid_jax.core.ranges import settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step

Distance = Annotated[int, Interval(ge=0, le=10_000)]
WAIT, WHICH = "wait", "which?"
SIDES, ON = ("left", "right"), "on"


@ENVIRONMENTS.register("memory_length")
@settings
class MemoryLength:
    """A symbol is told, and asked for after some turns in which nothing is said.

    What the policy answers before the question changes nothing and earns nothing. It can say the symbol there
    to read it again later: only a policy that does not read its own earlier answers needs a memory of its own.

    Attributes:
        length: turns between what is told and the question.
        num_symbols: there are, the first of the digits.
    """

    length: Distance = 10
    num_symbols: Annotated[int, Interval(ge=2, le=10)] = 2

    def make(self, answer_fn: AnswerFn | None = None) -> Recall:
        """A conversation of its own."""
        return Recall(self.moves(), self.length, None)

    def moves(self) -> Sequence[str]:
        """The symbols."""
        return _digits(self.num_symbols)

    def expert(self, messages: Sequence[Message]) -> str:
        """The symbol where it is asked for; else the first, whichever was told."""
        said = _said_by_user(messages)
        return said[0] if said[-1] == WHICH else self.moves()[0]

    def optimal_return(self) -> float:
        """The return of a policy that remembers: 1."""
        return 1.0

    def best_without_history(self) -> float:
        """The largest expected return of a policy that sees the last message alone: 2 / num_symbols - 1."""
        return 2 / self.num_symbols - 1


@ENVIRONMENTS.register("memory_size")
@settings
class MemorySize:
    """Some bits are told at once, and one of them is asked for by its number after some turns.

    What the policy answers before the question changes nothing and earns nothing.

    Attributes:
        size: how many bits are told.
        length: turns between what is told and the question.
    """

    size: Annotated[int, Interval(ge=1, le=1000)] = 5
    length: Distance = 1

    def make(self, answer_fn: AnswerFn | None = None) -> Recall:
        """A conversation of its own."""
        return Recall(self.moves(), self.length, self.size)

    def moves(self) -> Sequence[str]:
        """Both values of a bit."""
        return _digits(2)

    def expert(self, messages: Sequence[Message]) -> str:
        """The bit where it is asked for; else the first value."""
        said = _said_by_user(messages)
        return said[0].split()[int(said[-1][:-1]) - 1] if said[-1].endswith("?") else self.moves()[0]

    def optimal_return(self) -> float:
        """The return of a policy that remembers every bit: 1."""
        return 1.0

    def best_without_history(self) -> float:
        """The largest expected return of a policy that sees the last message alone: 0, as of a guess."""
        return 0.0


class Recall:
    """One conversation: symbols are told, some turns pass, and one of them is asked for.

    Args:
        symbols: to draw from.
        length: turns that pass.
        size: how many are told and numbered; None: one, without a number.
    """

    def __init__(self, symbols: Sequence[str], length: int, size: int | None):
        self._symbols, self._length, self._size = symbols, length, size

    def reset(self, seed: int) -> Sequence[Message]:
        """Draws what is told, and what is asked for."""
        source = random.Random(seed)
        told = [source.choice(self._symbols) for _ in range(self._size or 1)]
        asked = source.randrange(len(told))
        self._question = WHICH if self._size is None else f"{asked + 1}?"
        self._answer, self._left = told[asked], self._length + 1
        return [_said(" ".join(told))]

    def step(self, text: str) -> Step:
        """Waits, asks, or judges the answer to the question."""
        if self._left == 0:
            return _judged(text, self._answer)
        self._left -= 1
        return Step([_said(WAIT if self._left else self._question)], 0.0, False)


@ENVIRONMENTS.register("t_maze")
@settings
class TMaze:
    """A sign at the start says where to turn at the end of a hall.

    ``on`` is one step; at the fork, ``left`` or ``right`` ends the walk. Anything else before it ends the walk
    as the wrong turn does: no detour and no note tells a policy without memory at the fork what the sign was.

    Attributes:
        length: steps from the sign to the fork.
    """

    length: Annotated[int, Interval(ge=1, le=10_000)] = 10

    def make(self, answer_fn: AnswerFn | None = None) -> Walk:
        """A walk of its own."""
        return Walk(self)

    def moves(self) -> Sequence[str]:
        """A step, and both turns."""
        return [ON, *SIDES]

    def expert(self, messages: Sequence[Message]) -> str:
        """Goes on, and turns at the fork as the sign says."""
        said = _said_by_user(messages)
        return said[0] if said[-1] == "fork" else ON

    def optimal_return(self) -> float:
        """The return of a policy that remembers: 1."""
        return 1.0

    def best_without_history(self) -> float:
        """The largest expected return of a policy that sees the last message alone, or counts too: 0."""
        return 0.0


class Walk:
    """One walk through the maze."""

    def __init__(self, settings: TMaze):
        self._settings = settings

    def reset(self, seed: int) -> Sequence[Message]:
        """Draws the sign."""
        self._side, self._left = random.Random(seed).choice(SIDES), self._settings.length
        return [_said(self._side)]

    def step(self, text: str) -> Step:
        """Goes on, or ends the walk."""
        if self._left == 0 or text.strip() != ON:
            return _judged(text if self._left == 0 else "", self._side)
        self._left -= 1
        return Step([_said("hall" if self._left else "fork")], 0.0, False)


def _judged(text: str, answer: str) -> Step:
    right = text.strip() == answer
    reply = "right" if right else f"wrong, {answer}"
    return Step([_said(reply)], 1.0 if right else -1.0, True, info={"right": right})


def _digits(number: int) -> Sequence[str]:
    return [str(digit) for digit in range(number)]


def _said_by_user(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def _said(text: str) -> Message:
    return {"role": "user", "content": text}
