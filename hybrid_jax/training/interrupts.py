"""Ctrl-C and SIGTERM as a question that the training loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hybrid_jax.parallel import hosts


class Interrupted(SystemExit):
    """The run was stopped from outside and has saved itself; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class Interrupts:
    """Catches the first SIGINT or SIGTERM inside a ``with``; a second one acts as it always does.

    Outside the main thread, as in some notebooks, Python delivers no signals and nothing is caught.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}  # handlers by signal; None for one that was not set by Python

    def agreed(self) -> int | None:
        """The signal that has come to any of the processes of a run; all of them must ask together."""
        return max(number or 0 for number in hosts.exchange(self.number)) or None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
