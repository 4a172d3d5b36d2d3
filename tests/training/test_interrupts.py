import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from hybrid_jax.training.interrupts import Interrupted, Interrupts, leaving_in_order


@pytest.fixture(autouse=True)
def _signals_are_heard():
    """Also where the tests were started by ``nohup`` or in the background, whose children ignore signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_only_noted_and_handlers_are_put_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts() as interrupts:
        assert interrupts.number is None
        os.kill(os.getpid(), number)
        assert interrupts.number == number
        assert {n: signal.getsignal(n) for n in before} == before  # already: a second signal acts as ever
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_is_announced_before_the_run_can_end(monkeypatch):
    said = []

    def say(text):
        time.sleep(0.05)  # a thread that wakes late, as on a busy machine
        said.append(text)

    monkeypatch.setattr("hybrid_jax.training.interrupts._say", say)
    with Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert said == ["SIGTERM: saving after this step …"]


def test_a_second_ctrl_c_interrupts_at_once(ctrl_c):
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.number == signal.SIGINT


def test_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="no"), Interrupts():
        raise RuntimeError("no")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_python_did_not_set_becomes_the_default(monkeypatch):
    handlers = {}

    def set_handler(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        handlers[number] = handler

    monkeypatch.setattr(signal, "signal", set_handler)  # returns None, as for a handler set in C
    with Interrupts():
        pass
    assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with Interrupts() as interrupts:
            seen.append((interrupts.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run_ends_the_process_with_its_code(number, code):
    assert Interrupted(number).code == code
    assert isinstance(Interrupted(number), SystemExit)


BLOCKED = """
import hashlib
from hybrid_jax.training.interrupts import Interrupts
with Interrupts():
    print("blocked", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 4_000_000)  # as XLA: no handler of Python runs meanwhile
    print("free", flush=True)
"""
LOADING = """
import sys, time
from pathlib import Path
from hybrid_jax.training.interrupts import leaving_in_order
from hybrid_jax.runs.lock import DiskLockFile, owned
with owned(DiskLockFile(Path(sys.argv[1])), "mine"), leaving_in_order():
    print("loading", flush=True)
    time.sleep(60)
"""
CLOSED = """
import fcntl, sys, termios, time
from pathlib import Path
from hybrid_jax.training.interrupts import Interrupts
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is ours, so we hear of its end
with Interrupts() as interrupts:
    print("begun", flush=True)
    while interrupts.number is None:
        time.sleep(0.01)
    time.sleep(0.1)
    print("progress", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(f"saved after {interrupts.number}")
"""


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_is_answered_at_once_also_while_the_device_is_waited_for(number, name):
    command = [sys.executable, "-c", BLOCKED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(number)
        assert process.stdout.read() == f"{name}: saving after this step …\nfree\n"
    assert process.returncode == 0


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")])
def test_a_signal_before_the_first_step_ends_a_run_with_a_word_and_leaves_no_lock(tmp_path, number, name):
    command = [sys.executable, "-c", LOADING, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "loading\n"
        assert (tmp_path / "run" / "lock.json").exists()
        process.send_signal(number)
        assert process.stderr.read() == f"{name}: no step is under way, so there is nothing to save\n"
    assert process.returncode == 128 + number
    assert not (tmp_path / "run").exists()


def test_only_the_handlers_that_nobody_has_set_are_ours_before_the_first_step():
    mine = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        own = signal.getsignal(signal.SIGTERM)
        with leaving_in_order():
            assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_a_closed_terminal_stops_a_run_that_can_still_save(tmp_path):
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "end")]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=side, start_new_session=True) as process:
        os.close(side)
        said = b""
        while not said.endswith(b"\n"):  # the whole line: the rest of a write would fail once it is closed
            said += os.read(terminal, 16)
        assert said == b"begun\r\n"
        os.close(terminal)
    assert process.returncode == 0
    assert (tmp_path / "end").read_text() == "saved after 1"


def test_a_hangup_that_is_ignored_stays_so_and_one_after_another_signal_does_not_end_the_saving():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.number is None
    finally:
        signal.signal(signal.SIGHUP, before)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) is before


def test_who_was_woken_by_signals_before_still_is():
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
            assert os.read(reads, 8) == bytes([signal.SIGTERM])
        deadline = time.monotonic() + 5
        while any(thread.name == "signals" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
        assert signal.set_wakeup_fd(writes) == writes
    finally:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)
