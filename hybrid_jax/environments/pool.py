"""Many conversations at once, each with an environment on a thread of its own.

An environment may wait for a program or a network, hang, raise or flood. None of it reaches the others: its
thread is one that no exit waits for, which is abandoned when the time is over, and a failure is a reply like
any other. All threads are in this process: what holds Python's lock, or ends the process, holds up or ends all.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.waiting import first_of
from hybrid_jax.environments.base import AnswerFn, Environment, EnvironmentSettings
from hybrid_jax.environments.replies import (
    BadReply,
    Said,
    first_difference,
    said_at_reset,
    said_at_step,
    tools_of,
)


@dataclass(frozen=True)
class Reply:
    """A reply of one conversation's environment, to its reset or to a step."""

    place: int  # the number of the conversation
    messages: Sequence[Message]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None  # one line; the conversation cannot go on


class Worlds:
    """Conversations under way, each known by the number of its place. For one thread of the host.

    A call that fails is tried again ``retries`` times, as a call of a new environment that begins with the same
    seed and row and is given the same answers again; one that replies otherwise than before has failed, too.

    Args:
        environment: the settings, from which every conversation makes an environment of its own.
        timeout_seconds: of one call of `reset` or `step`.
        retries: further tries of a call that failed.
        most_letters: of the messages of one reply together; what goes beyond is cut off, and said to be.
        answer_fn: another language model, for an environment that asks one.
    """

    def __init__(
        self,
        environment: EnvironmentSettings,
        *,
        timeout_seconds: float,
        retries: int,
        most_letters: int,
        answer_fn: AnswerFn | None = None,
    ):
        getattr(environment, "prepare", lambda: None)()
        self._environment, self._answer_fn = environment, answer_fn
        self._timeout, self._retries, self._most_letters = timeout_seconds, retries, most_letters
        self._conversations: dict[int, _Conversation] = {}
        self._counts = _no_counts()

    def reset(self, place: int, seed: int, row: Mapping[str, Any]) -> None:
        """Starts a conversation at a place, with a new environment; one that was there is closed."""
        self.close(place)
        conversation = _Conversation(seed, row, self._start())
        self._conversations[place] = conversation
        self._ask(conversation, [None])

    def step(self, place: int, text: str) -> None:
        """Starts the reply to an answer.

        Raises:
            ValueError: the conversation has no reply yet to what it was asked last, or has failed.
        """
        conversation = self._conversations[place]
        if conversation.task is not None or conversation.failed:
            raise ValueError(f"the conversation at place {place} waits for no answer")
        conversation.texts.append(text)
        conversation.tries = 0
        self._ask(conversation, [text])

    def tools(self, place: int) -> Sequence[Mapping[str, Any]]:
        """The JSON schemas of the environment's tools; none before the reply to its reset."""
        return self._conversations[place].tools

    def finished(self, wait_seconds: float | None = None) -> list[Reply]:
        """Gives the replies that have arrived, in order of place.

        Args:
            wait_seconds: for the first of them, where something is under way; None waits as long as it takes,
                which the time-outs bound; 0 only looks.

        Raises:
            Stopped: the program is to stop.
        """
        end = math.inf if wait_seconds is None else time.monotonic() + wait_seconds
        replies: list[Reply] = []
        while not replies and any(c.task for c in self._conversations.values()):
            tasks = [c.task for c in self._conversations.values() if c.task is not None]
            late = min(task.began for task in tasks) + self._timeout
            done = first_of([task.result for task in tasks], min(end, late) - time.monotonic())
            for place, conversation in sorted(self._conversations.items()):
                if conversation.task is not None and conversation.task.result in done:
                    replies += self._arrived(place, conversation, conversation.task.result.result())
                elif conversation.task is not None and self._is_late(conversation.task):
                    self._counts["timeouts"] += 1
                    error = f"no reply within timeout_seconds, {self._timeout:g}"
                    replies += self._failed(place, conversation, conversation.task.number, error)
            if time.monotonic() >= end:
                break
        return replies

    def close(self, place: int | None = None) -> None:
        """Ends the conversation at a place, if there is one; all of them without a place. Does not wait."""
        for known in [place] if place is not None else list(self._conversations):
            if (conversation := self._conversations.pop(known, None)) is not None:
                conversation.inbox.put(None)

    def take_counts(self) -> dict[str, int]:
        """The numbers of failures, timeouts among them, retries and letters cut off, since the last call."""
        taken, self._counts = self._counts, _no_counts()
        return taken

    def _start(self) -> queue.SimpleQueue:
        """Starts the thread of one environment; gives where it takes its tasks from."""
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_live, args=(self._make, inbox), name="environment", daemon=True).start()
        return inbox

    def _make(self) -> Environment:
        return self._environment.make(*(() if self._answer_fn is None else (self._answer_fn,)))

    def _ask(self, conversation: _Conversation, texts: list[str | None]) -> None:
        first = len(conversation.texts) + 1 - len(texts)
        task = _Task(texts, first, conversation.seed, conversation.row, self._most_letters)
        conversation.task = task
        conversation.inbox.put(task)

    def _is_late(self, task: _Task) -> bool:
        return not task.result.done() and time.monotonic() >= task.began + self._timeout

    def _arrived(self, place: int, conversation: _Conversation, outcome: _Outcome) -> list[Reply]:
        known, said = conversation.said, outcome.said
        if outcome.error is not None:
            return self._failed(place, conversation, outcome.number, outcome.error)
        if len(said) > 1 and (number := first_difference(known, said)) is not None:
            error = "not deterministic: it replied otherwise when it was begun again with the same seed"
            return self._failed(place, conversation, number, error)
        conversation.task, conversation.tools = None, outcome.tools
        last = said[-1]
        if not known and last.cut:
            error = f"its first messages have {last.cut:,} letters more than are read, {self._most_letters:,}"
            return self._failed(place, conversation, 0, error)
        known.append(last)
        self._counts["cut_letters"] += last.cut
        return [Reply(place, last.messages, last.reward, last.terminated, last.truncated, last.info)]

    def _failed(self, place: int, conversation: _Conversation, number: int, error: str) -> list[Reply]:
        """Begins the conversation again where another try is left; else the failure is its reply."""
        self._counts["failures"] += 1
        conversation.inbox.put(None)  # ends its thread, as soon as its environment lets it
        if conversation.tries < self._retries:
            conversation.tries += 1
            self._counts["retries"] += 1
            conversation.inbox = self._start()
            self._ask(conversation, [None, *conversation.texts])
            return []
        conversation.task, conversation.failed = None, True
        name, when = type(self._environment).__name__, f"step {number}" if number else "reset"
        return [Reply(place, (), failure=f"environment {name}, seed {conversation.seed}, {when}: {error}")]


def _no_counts() -> dict[str, int]:
    return {"failures": 0, "timeouts": 0, "retries": 0, "cut_letters": 0}


@dataclass
class _Conversation:
    seed: int
    row: Mapping[str, Any]
    inbox: queue.SimpleQueue
    texts: list[str] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)  # at its reset and to each of the texts but one under way
    tools: Sequence[Mapping[str, Any]] = ()
    tries: int = 0  # of the call under way that have failed
    failed: bool = False
    task: _Task | None = None  # under way


@dataclass
class _Task:
    """Calls in a row of one environment; a None in ``texts`` is its reset."""

    texts: list[str | None]
    number: int  # of the call under way: 0 is the reset
    seed: int
    row: Mapping[str, Any]
    most_letters: int
    result: Future[_Outcome] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)  # the call under way


@dataclass(frozen=True)
class _Outcome:
    said: list[Said]
    number: int  # of the last call
    tools: Sequence[Mapping[str, Any]] = ()
    error: str | None = None


def _live(make: Callable[[], Environment], inbox: queue.SimpleQueue) -> None:
    """Lets one environment do its tasks until the end of them."""
    environment: Environment | None = None
    while (task := inbox.get()) is not None:
        said: list[Said] = []
        try:
            environment = make() if environment is None else environment
            for number, text in enumerate(task.texts, task.number):
                task.number, task.began = number, time.monotonic()
                said.append(_call(environment, task, text))
            outcome = _Outcome(said, task.number, tools_of(environment))
        except BaseException as error:  # of code of a user's, which may even want to end the program
            outcome = _Outcome(said, task.number, error=_line(error))
        task.result.set_result(outcome)
    with contextlib.suppress(BaseException):
        getattr(environment, "close", lambda: None)()


def _call(environment: Environment, task: _Task, text: str | None) -> Said:
    if text is None:
        return said_at_reset(environment.reset(task.seed, **task.row), task.most_letters)
    return said_at_step(environment.step(text), task.most_letters)


def _line(error: BaseException) -> str:
    """An error in one line, with the place in the code where it was raised."""
    try:
        text = " ".join(str(error).split())[:300]
    except BaseException:  # its own code fails
        text = ""
    if isinstance(error, BadReply):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}{text and ': '}{text} ({Path(last.filename).name}, line {last.lineno})"
