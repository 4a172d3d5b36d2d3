"""Actors: threads that roll out and compute gradients while the updates of others go on.

The main thread owns the parameters. It hands an actor a copy of them with the prompts to answer, and takes
what comes back in the order in which it comes. A rollout that was begun is always learned: how stale one may
become is bounded by when new ones begin, never by what is thrown away, which would starve slow answers.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from hybrid_jax.core import waiting
from hybrid_jax.core.errors import UserError

Work = Callable[[int, Callable[[], None]], Any]  # of an actor, by its number; asks between its stages
_LEAVE_SECONDS = 10.0  # that the end of the process waits for actors on a device; a reward is not waited for


@dataclass(frozen=True)
class Begun:
    """A rollout that an actor has begun.

    Attributes:
        actor: its number.
        version: steps of the run when its parameters were copied.
        cursor: the first of its prompts.
        result: what the actor sends.
    """

    actor: int
    version: int
    cursor: int
    result: Future[Any]


class Actors:
    """The actors of one phase, each with at most one rollout under way.

    Args:
        phase: its name, for threads and errors.
        count: how many there are.
        max_staleness: the most updates between the copy of the parameters and the update that it leads to.
    """

    def __init__(self, phase: str, count: int, max_staleness: int):
        self._phase, self._count, self._most = phase, count, max_staleness
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self.under_way: list[Begun] = []
        atexit.register(_leave, weakref.ref(self))

    def may_begin(self, version: int, at_most: int) -> bool:
        """Tells whether another rollout may begin.

        Each rollout under way may be overtaken by all others, the new one among them: the updates until now and
        theirs must stay within the bound.

        Args:
            version: steps of the run until now.
            at_most: rollouts that there are updates for.
        """
        busy = len(self.under_way)
        oldest = min((begun.version for begun in self.under_way), default=version)
        return busy < min(self._count, at_most) and version - oldest + busy <= self._most

    def begin(self, version: int, cursor: int, work: Work) -> None:
        """Lets an idle actor begin: ``work(actor, check)`` runs in its thread.

        ``work`` calls ``check`` between its stages, which ends it where the process is about to end.
        """
        busy = {begun.actor for begun in self.under_way}
        actor = next(number for number in range(self._count) if number not in busy)
        result: Future[Any] = Future()

        def run() -> None:
            try:
                result.set_result(work(actor, self._check))
            except BaseException as error:  # whatever ends an actor ends the run, by the step that waits
                result.set_exception(error)

        thread = threading.Thread(target=run, name=f"{self._phase} actor {actor}", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        self.under_way = [*self.under_way, Begun(actor, version, cursor, result)]
        thread.start()

    def next(self) -> tuple[Begun, Any]:
        """Waits for the next rollout to be finished; of several, takes the one that was begun first.

        Raises:
            Stopped: the run is to stop; all rollouts stay under way.
            UserError: the actor ended without a result.
        """
        done = waiting.first_of([begun.result for begun in self.under_way])
        begun = next(begun for begun in self.under_way if begun.result in done)
        error = begun.result.exception()
        if error is not None:
            self.under_way = []  # a later training begins them anew
            if isinstance(error, Exception | KeyboardInterrupt):
                raise error
            raise UserError(
                f"phases.{self._phase}: actor {begun.actor} was ended by {type(error).__name__}; the same "
                "command goes on"
            ) from error
        self.under_way = [other for other in self.under_way if other is not begun]
        return begun, begun.result.result()

    def _check(self) -> None:
        if self._leaving.is_set():
            raise waiting.Stopped

    def leave(self) -> None:
        """Ends the actors after the stage that they are in: a device must not compute while a process ends."""
        self._leaving.set()
        end = time.monotonic() + _LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))


def _leave(actors: weakref.ref[Actors]) -> None:
    if (there := actors()) is not None:
        there.leave()
