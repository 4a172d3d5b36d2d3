"""Waiting for the network in the main thread: the first request to stop ends it.

A training step is not broken off by Ctrl-C, for it is soon over. Where it waits for a server it may not be.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.1
_stop = threading.Event()


class Stopped(KeyboardInterrupt):
    """A wait was given up since the program is to stop; what came before it is whole."""


def ask_to_stop() -> None:
    """Ends the waits that are under way, and those to come, until `go_on`."""
    _stop.set()


def go_on() -> None:
    _stop.clear()


def result_of(future: Future[T]) -> T:
    """Waits for ``future`` and gives its result, or raises its error.

    Raises:
        Stopped: `ask_to_stop` was called before it was there.
    """
    while not wait([future], timeout=_LOOK_SECONDS).done:
        if _stop.is_set():
            raise Stopped
    return future.result()
