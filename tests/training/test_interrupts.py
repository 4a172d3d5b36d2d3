import os
import signal
import threading

import pytest

from hybrid_jax.training.interrupts import Interrupted, Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_only_noted_and_handlers_are_put_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts() as interrupts:
        assert interrupts.number is None
        os.kill(os.getpid(), number)
        assert interrupts.number == number
        assert {n: signal.getsignal(n) for n in before} == before  # already: a second signal acts as ever
    assert {n: signal.getsignal(n) for n in before} == before


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
    assert handlers == {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}


def test_outside_the_main_thread_nothing_is_caught_and_nothing_fails():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with Interrupts() as interrupts:
            seen.append((interrupts.number, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_the_process_with_its_code(number, code):
    assert Interrupted(number).code == code
    assert isinstance(Interrupted(number), SystemExit)
