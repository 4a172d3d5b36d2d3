"""Turns Ctrl-C, SIGTERM and SIGHUP into a question that the training loop asks between two steps."""

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
    """Ends a run that has saved itself after a signal; the exit code is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


@contextlib.contextmanager
def leaving_in_order() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP, before the first step and after the last, raise an error that cleans up.

    Otherwise they would end the process at once and leave its lock behind. A handler that the user has set
    stays. One of several processes still ends at once, since alone it cannot end in order.

    Raises:
        Interrupted: such a signal came.
    """
    numbers = []
    if threading.current_thread() is threading.main_thread() and hosts.size() == 1:
        ours = (signal.SIGTERM, _HANGUP)
        numbers = [n for n in ours if n is not None and signal.getsignal(n) == signal.SIG_DFL]

    def leave(number: int, frame: FrameType | None) -> None:
        for other in numbers:  # a closing terminal sends several; any other second one ends the process
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
    """Catches the first SIGINT, SIGTERM or SIGHUP inside a ``with``; a second one acts as usual.

    The signal is announced at once, even while the main thread waits for the device or for the compiler: Python
    calls no handler then, but the bytes that it writes for every signal wake a thread. The handler waits for
    that thread, so that nothing ends before the announcement. A SIGHUP that is ignored (``nohup``) stays
    ignored, and so is one after another signal, since a terminal that closes sends several.

    Outside the main thread, as in some notebooks, Python delivers no signals, and nothing is caught.
    """

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}  # handlers by signal; None for one that was not set by Python
        self._pipe: tuple[int, int] | None = None  # the end that the thread reads, the end that Python writes
        self._announced = threading.Event()
        self._told_before = -1  # the file to which Python wrote signals before

    def agreed(self) -> int | None:
        """Returns the signal that any process of the run has received; all must call it together."""
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
        # A stop that is quick would otherwise end the process before the thread is awake. The limit is for a
        # handler that interrupts a write to stderr, whose lock the thread then waits for.
        self._announced.wait(timeout=1.0)
        if hosts.size() == 1:  # several processes must stop together, between two steps
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
            target=_announce, args=(reads, self._told_before, self._announced), name="signals", daemon=True
        )
        thread.start()


def _announce(reads: int, told_before: int, announced: threading.Event) -> None:
    """Announces the first of our signals; passes all of them on to the file that Python wrote to before."""
    while numbers := os.read(reads, 64):
        if told_before >= 0:
            with contextlib.suppress(OSError):
                os.write(told_before, numbers)
        for number in numbers:
            if number in _NAMES and not announced.is_set():
                if hosts.is_first():
                    _say(f"{_NAMES[signal.Signals(number)]}: saving after this step …")
                announced.set()
    os.close(reads)


def _say(text: str) -> None:
    """Writes a line to stderr; once its terminal is closed, all further output goes nowhere."""
    try:
        new_line = "\n" if sys.stderr.isatty() else ""  # below the progress
        print(f"{new_line}{text}", file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        os.close(nowhere)
