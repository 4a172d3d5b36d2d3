"""Lets the main thread wait for the network until the first request to stop.

Ctrl-C does not interrupt a training step, since a step ends soon. One that waits for a server may not.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.1
_stop = threading.Event()


class Stopped(KeyboardInterrupt):
    """Raised where a wait is given up because the program is to stop; what came before it is complete."""


def ask_to_stop() -> None:
    """Ends all waits, those under way and those that begin later, until `go_on` is called."""
    _stop.set()


def go_on() -> None:
    """Lets waits begin again after `ask_to_stop`."""
    _stop.clear()


def result_of(future: Future[T]) -> T:
    """Waits for ``future`` and gives its result, or raises its error.

    Raises:
        Stopped: `ask_to_stop` was called before the result was there.
    """
    first_of([future])
    return future.result()


def first_of(futures: Collection[Future[T]], seconds: float = math.inf) -> set[Future[T]]:
    """Waits until any of ``futures`` is done, and gives all that are; none after so many ``seconds``.

    Raises:
        Stopped: `ask_to_stop` was called before one was.
    """
    end = time.monotonic() + seconds
    while True:
        left = max(end - time.monotonic(), 0.0)
        done = wait(futures, timeout=min(_LOOK_SECONDS, left), return_when=FIRST_COMPLETED).done
        if done or left == 0.0:
            return done
        if _stop.is_set():
            raise Stopped
