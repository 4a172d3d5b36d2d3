"""Ctrl-C, SIGTERM and SIGHUP as a question that the training loop asks between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from hybrid_jax.core import waiting
from hybrid_jax.core.cli import Ended
from hybrid_jax.parallel import hosts

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_HANGUP = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has none
if _HANGUP is not None:
    _NAMES[_HANGUP] = "SIGHUP"


class Interrupted(Ended):
    """The run was stopped from outside and has saved itself; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


@contextlib.contextmanager
def leaving_in_order() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the code before the first step and after the last as an error does.

    They would end the process on the spot and leave its lock behind. A handler that somebody has set stays. So
    does the end on the spot of one of several processes: alone it cannot leave in order.

    Raises:
        Interrupted: one has come.
    """
    numbers = []
    if threading.current_thread() is threading.main_thread() and hosts.size() == 1:
        ours = (signal.SIGTERM, _HANGUP)
        numbers = [n for n in ours if n is not None and signal.getsignal(n) == signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        for other in numbers:  # a terminal sends several; any other second one ends the process
            signal.signal(other, signal.SIG_IGN if other == _HANGUP else signal.SIG_DFL)
        _say(f"{_NAMES[signal.Signals(number)]}: no step is under way, so there is nothing to save")
        raise Interrupted(number)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is leave:
                signal.signal(number, signal.SIG_DFL)


class Interrupts:
    """Catches the first SIGINT, SIGTERM or SIGHUP inside a ``with``; a second one acts as it always does.

    It says at once that it has come, also while the main thread waits for the device or for the compiler: then
    Python calls no handler, but the bytes that it writes for every signal wake a thread. A SIGHUP that is
    ignored (``nohup``) stays ignored; one that follows another signal is, too, since a terminal sends several.

    Outside the main thread, as in some notebooks, Python delivers no signals and nothing is caught.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}  # handlers by signal; None for one that was not set by Python
        self._pipe: tuple[int, int] | None = None  # what the thread reads, what Python writes
        self._told_before = -1  # to whom Python wrote the signals outside

    def agreed(self) -> int | None:
        """The signal that has come to any of the processes of a run; all of them must ask together."""
        return max(number or 0 for number in hosts.exchange(self.number)) or None

    def __enter__(self) -> Interrupts:
        waiting.go_on()
        if threading.current_thread() is threading.main_thread():
            self._listen()
            for number in _NAMES:
                if number == _HANGUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        waiting.go_on()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._told_before)
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore(but=_HANGUP)
        if _HANGUP in self._before:
            signal.signal(_HANGUP, signal.SIG_IGN)
        if hosts.size() == 1:  # several must leave together, between two steps
            waiting.ask_to_stop()

    def _restore(self, but: int | None = None) -> None:
        for number in [number for number in self._before if number != but]:
            handler = self._before.pop(number)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _listen(self) -> None:
        reads, writes = self._pipe = os.pipe()
        os.set_blocking(writes, False)
        self._told_before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        thread = threading.Thread(
            target=_announce, args=(reads, self._told_before), name="signals", daemon=True
        )
        thread.start()


def _announce(reads: int, told_before: int) -> None:
    """Says that the first of our signals has come; passes all of them on to who was told before."""
    said = False
    while numbers := os.read(reads, 64):
        if told_before >= 0:
            with contextlib.suppress(OSError):
                os.write(told_before, numbers)
        for number in numbers:
            if number in _NAMES and not said and hosts.is_first():
                said = True
                _say(f"{_NAMES[signal.Signals(number)]}: saving after this step …")
    os.close(reads)


def _say(text: str) -> None:
    """A line on stderr; where that is a terminal which was closed, what is still to be said goes nowhere."""
    try:
        new_line = "\n" if sys.stderr.isatty() else ""  # below the progress
        print(f"{new_line}{text}", file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)
