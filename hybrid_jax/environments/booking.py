"""Booking a table with a scripted user: slot filling whose best return is known.

    user        a table please
    assistant   ask cuisine
    user        thai
    assistant   ask time
    user        7pm
    assistant   ask people
    user        2
    assistant   book thai 7pm 2

What the user wants is drawn anew for each conversation, every value of a slot as likely as any other. A slot is
known once it was asked for, so dynamic programming over the sets of known slots gives the best return there is.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Interval

from hybrid_jax.core.batches import Message
from hybrid_jax.core.ranges import NonNegative, Positive, settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step

SLOTS = {
    "cuisine": ("thai", "greek", "indian", "french", "mexican", "korean"),
    "time": ("7pm", "8pm", "6pm", "9pm", "5pm", "noon"),
    "people": ("2", "4", "6", "3", "5", "8"),
}
START, UNCLEAR = "a table please", "what?"


@ENVIRONMENTS.register("booking")
@settings
class Booking:
    """A user who wants a table: ask for what is needed, then book it.

    The policy asks for a slot, ``ask cuisine``, and is told its value; or it books, ``book thai 7pm 2`` with
    one value of every slot in any order, which ends the conversation. Anything else is answered ``what?`` and
    costs as much as a question. A question beyond ``max_questions`` ends the conversation without an answer.

    Attributes:
        num_slots: how many there are, the first of cuisine, time, people.
        num_values: how many values each has.
        max_questions: that are answered.
        question_cost: taken off for each question.
        slot_reward: for each slot that is booked as the user wants it.
        rules: begins with a message of the system that tells a language model what to do.
    """

    num_slots: Annotated[int, Interval(ge=1, le=3)] = 3
    num_values: Annotated[int, Interval(ge=2, le=6)] = 3
    max_questions: Annotated[int, Interval(ge=0, le=20)] = 3
    question_cost: NonNegative = 0.1
    slot_reward: Positive = 1.0
    rules: bool = False

    def make(self, answer_fn: AnswerFn | None = None) -> Talk:
        """A conversation of its own."""
        return Talk(self)

    @property
    def slots(self) -> Mapping[str, Sequence[str]]:
        """The values of each slot."""
        return {name: values[: self.num_values] for name, values in list(SLOTS.items())[: self.num_slots]}

    def moves(self) -> Sequence[str]:
        """All that can be asked and booked."""
        bookings = itertools.product(*self.slots.values())
        return [*(f"ask {slot}" for slot in self.slots), *(" ".join(("book", *values)) for values in bookings)]

    def expert(self, messages: Sequence[Message]) -> str:
        """The best answer to a conversation so far, its own answers in it; the first of several."""
        told = {m["content"] for m in messages if m["role"] == "user"}
        known = {slot: value for slot, values in self.slots.items() for value in values if value in told}
        asked = sum(m["role"] == "assistant" for m in messages)
        if _value(self, len(known), self.max_questions - asked)[1]:
            return f"ask {next(slot for slot in self.slots if slot not in known)}"
        return " ".join(("book", *(known.get(slot, values[0]) for slot, values in self.slots.items())))

    def optimal_return(self) -> float:
        """The largest expected sum of rewards, by dynamic programming over how many slots are known."""
        return _value(self, 0, self.max_questions)[0]

    def best_without_history(self) -> float:
        """A bound on the expected return of every policy that sees the last message alone.

        It is the largest return of those that see more: the last message, and what they asked so far, but no
        earlier answer. Such a policy can only tell what a user has said from where it goes on asking: one that
        books at once for all but a user who says "thai" knows the cuisine of those that it still talks to.
        """
        sizes = (self.num_values,) * self.num_slots
        return _after_no_answer(self, sizes, self.max_questions)


class Talk:
    """One conversation."""

    def __init__(self, settings: Booking):
        self._settings = settings

    def reset(self, seed: int) -> Sequence[Message]:
        """Draws what the user wants."""
        source = random.Random(seed)
        self._wanted = {slot: source.choice(values) for slot, values in self._settings.slots.items()}
        self._left = self._settings.max_questions
        rules = [{"role": "system", "content": _rules(self._settings)}] if self._settings.rules else []
        return [*rules, _said(START)]

    def step(self, text: str) -> Step:
        """Replies to a question or a booking."""
        match text.lower().split():
            case ["book", *values] if (booked := self._booked(values)) is not None:
                right = sum(booked[slot] == value for slot, value in self._wanted.items())
                reply = "thanks" if right == len(booked) else f"no, {' '.join(self._wanted.values())}"
                return Step([_said(reply)], self._settings.slot_reward * right, True, info={"right": right})
            case ["ask", slot] if slot in self._wanted and self._left > 0:
                reply = self._wanted[slot]
            case _:
                reply = UNCLEAR
        self._left -= 1
        unclear = {"unclear": 1} if reply == UNCLEAR else {}
        return Step([_said(reply)], -self._settings.question_cost, self._left < 0, info=unclear)

    def _booked(self, values: Sequence[str]) -> dict[str, str] | None:
        """The value of every slot; None where one is missing, twice there or unknown."""
        of = {value: slot for slot, known in self._settings.slots.items() for value in known}
        booked = {of[value]: value for value in values if value in of}
        return booked if len(booked) == len(values) == self._settings.num_slots else None


@functools.cache
def _value(world: Booking, known: int, left: int) -> tuple[float, bool]:
    """The best return from here on with so many slots known, and whether it asks for another one.

    V(k, n) = max { reward (k + (K - k) / v),  -cost + V(k + 1, n - 1) }   for K slots of v values each
    """
    book = world.slot_reward * (known + (world.num_slots - known) / world.num_values)
    ask = -float("inf")
    if left > 0 and known < world.num_slots:
        ask = _value(world, known + 1, left - 1)[0] - world.question_cost
    return max(book, ask), ask > book + 1e-9


Sizes = tuple[int, ...]  # of each slot, the number of values that the user may have in mind


def _book(world: Booking, sizes: Sizes) -> float:
    return world.slot_reward * sum(1 / size for size in sizes)


@functools.cache
def _after_no_answer(world: Booking, sizes: Sizes, left: int) -> float:
    """The best return where the last message says nothing of a slot: it is the same for all these users."""
    options = [_book(world, sizes), -world.question_cost]
    if left > 0:
        options += [
            _after_answer(world, sizes, slot, left - 1) - world.question_cost for slot in range(len(sizes))
        ]
        options.append(_after_no_answer(world, sizes, left - 1) - world.question_cost)
    return max(options)


@functools.cache
def _after_answer(world: Booking, sizes: Sizes, slot: int, left: int) -> float:
    """The best return, averaged over the values of ``slot`` that the last message may have said.

    For every value it is decided what to do next. ``size`` of them that are followed by the same question are
    told apart no more, so only the numbers matter.
    """

    def narrowed(size: int) -> Sizes:
        return (*sizes[:slot], size, *sizes[slot + 1 :])

    def worth(size: int) -> list[float]:
        """The worth of ``size`` values that each question follows, or an unclear answer, which comes last."""
        asked = [_after_answer(world, narrowed(size), other, left - 1) for other in range(len(sizes))]
        return [
            size * (later - world.question_cost)
            for later in (*asked, _after_no_answer(world, narrowed(size), left - 1))
        ]

    numbers = range(sizes[slot] + 1)
    best = [_book(world, narrowed(1)) * number for number in numbers]  # all of so many are booked at once
    for way in zip(*(worth(size) for size in numbers[1:]), strict=True) if left > 0 else ():
        best = [max((0.0, *way)[size] + best[n - size] for size in range(n + 1)) for n in numbers]
    return best[-1] / sizes[slot]


def _said(text: str) -> Message:
    return {"role": "user", "content": text}


def _rules(world: Booking) -> str:
    questions = ", ".join(f'"ask {slot}"' for slot in world.slots)
    example = " ".join(values[0] for values in world.slots.values())
    return (
        f"Book a table for me. Ask for one thing at a time, at most {world.max_questions} times: {questions}. "
        f'Then book it, as in "book {example}".'
    )
