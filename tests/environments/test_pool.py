"""Worlds of many conversations: replies in order of place, and environments that hang, raise, flood or lie."""

import itertools
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from hybrid_jax.core import waiting
from hybrid_jax.environments.base import Step
from hybrid_jax.environments.pool import Reply, Worlds

HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Scripted:
    """Settings of an environment that does at its steps what a test gives it; a function of (seed, text)."""

    steps: list = field(default_factory=list)
    at_reset: object = None
    made: list = field(default_factory=list)
    closed: list = field(default_factory=list)

    def make(self, answer_fn=None):
        self.made.append(world := World(self, answer_fn))
        return world


class World:
    def __init__(self, settings, answer_fn):
        self.settings, self.answer_fn, self.number = settings, answer_fn, 0

    def reset(self, seed, **row):
        self.seed, self.row = seed, row
        return done(self.settings.at_reset, self, None) if self.settings.at_reset else HELLO

    def step(self, text):
        self.number += 1
        return done(self.settings.steps[self.number - 1], self, text)

    def close(self):
        self.settings.closed.append(self)


def done(what, world, text):
    return what(world, text) if callable(what) else what


def echo(world, text):
    return Step([{"role": "user", "content": f"{world.seed} heard {text}"}], 0.5, False)


def hang(world, text):
    threading.Event().wait()


def worlds(settings, timeout_seconds=10.0, retries=0, most_letters=1000, **more):
    return Worlds(settings, timeout_seconds=timeout_seconds, retries=retries, most_letters=most_letters, **more)


def reply_to(step, **settings):
    """The reply to one step that does ``step``."""
    pool = worlds(Scripted([step]), **settings)
    pool.reset(0, 7, {})
    assert pool.finished()[0].failure is None
    pool.step(0, "hi")
    (reply,) = pool.finished()
    return reply


def test_what_is_made_beforehand_takes_the_time_that_it_takes():
    """Longer than a conversation may wait for a reply."""

    class Slow(Scripted):
        def prepare(self):
            time.sleep(0.3)
            self.at_reset = [{"role": "user", "content": "prepared"}]

    pool = worlds(Slow(), timeout_seconds=0.2)
    pool.reset(0, 7, {})
    (reply,) = pool.finished()
    assert (reply.messages[0]["content"], reply.failure) == ("prepared", None)


def test_conversations_go_on_independently_and_replies_come_in_order_of_place():
    settings = Scripted([echo, echo])
    pool = worlds(settings)
    for place in (2, 0, 1):
        pool.reset(place, 10 + place, {})
    arrived = list(itertools.chain(*(pool.finished() for _ in range(3))))
    assert sorted(reply.place for reply in arrived) == [0, 1, 2]
    assert all(reply == Reply(reply.place, tuple(HELLO)) for reply in arrived)
    pool.step(1, "a")
    assert pool.finished() == [Reply(1, ({"role": "user", "content": "11 heard a"},), 0.5)]
    pool.step(1, "b")
    pool.step(0, "c")
    time.sleep(0.05)
    assert [(r.place, r.messages[0]["content"]) for r in pool.finished()] == [
        (0, "10 heard c"),
        (1, "11 heard b"),
    ]
    assert pool.finished() == []  # nothing is under way
    assert len(settings.made) == 3  # one environment for a conversation
    pool.close()
    for _ in range(100):
        if len(settings.closed) == 3:
            break
        time.sleep(0.01)
    assert len(settings.closed) == 3


def test_worlds_wait_at_the_same_time_and_not_one_after_the_other():
    pool = worlds(Scripted(at_reset=lambda *_: time.sleep(0.2) or HELLO))
    began = time.monotonic()
    for place in range(16):
        pool.reset(place, 0, {})
    assert pool.finished(0) == []  # only looks
    assert time.monotonic() - began < 0.15
    arrived = 0
    while arrived < 16:
        arrived += len(pool.finished())
    assert time.monotonic() - began < 1.0  # 3.2 one after the other


def test_a_reset_gets_its_row_and_the_other_language_model():
    settings = Scripted(
        at_reset=lambda world, _: [{"role": "user", "content": world.answer_fn(world.row["x"])}]
    )
    pool = worlds(settings, answer_fn=str.upper)
    pool.reset(0, 0, {"x": "word"})
    assert pool.finished()[0].messages[0]["content"] == "WORD"


def test_tools_are_known_once_the_reset_has_replied():
    settings = Scripted()
    pool = worlds(settings)
    World.tools = [{"type": "function", "function": {"name": "f"}}]
    try:
        pool.reset(0, 0, {})
        assert pool.tools(0) == ()
        pool.finished()
        assert pool.tools(0) == ({"type": "function", "function": {"name": "f"}},)
    finally:
        del World.tools


def test_a_world_that_hangs_fails_after_its_time_and_holds_up_no_other():
    pool = worlds(
        Scripted([lambda world, text: hang(world, text) if world.seed == 3 else echo(world, text)]), 0.3
    )
    for place in (0, 1):
        pool.reset(place, 3 + place, {})
    while len(pool._conversations[0].said) + len(pool._conversations[1].said) < 2:
        pool.finished()
    began = time.monotonic()
    pool.step(0, "a")
    pool.step(1, "a")
    (first,) = pool.finished()
    assert (first.place, first.failure) == (1, None)
    assert time.monotonic() - began < 0.25
    (second,) = pool.finished()
    assert second.failure == "environment Scripted, seed 3, step 1: no reply within timeout_seconds, 0.3"
    assert 0.25 < time.monotonic() - began < 0.8
    assert pool.take_counts() == {"failures": 1, "timeouts": 1, "retries": 0, "cut_letters": 0}
    assert pool.take_counts()["failures"] == 0
    with pytest.raises(ValueError, match="waits for no answer"):
        pool.step(0, "b")
    pool.reset(0, 4, {})  # the place is as good as new
    assert pool.finished()[0].failure is None


def test_a_world_that_hangs_does_not_hold_up_the_end_of_the_program():
    code = (
        "import sys; sys.path.insert(0, 'tests/environments'); import test_pool as t;"
        "pool = t.worlds(t.Scripted(at_reset=t.hang)); pool.reset(0, 0, {}); print(pool.finished(0.1))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.returncode) == ("[]\n", 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (BaseException("bare"), "BaseException: bare"),
        (ValueError("x" * 9999), "ValueError: " + "x" * 300),
    ],
)
def test_a_world_that_raises_is_one_line_with_the_place_in_its_code(error, line):
    def step(world, text):
        raise error

    number = step.__code__.co_firstlineno + 1
    assert (
        reply_to(step).failure == f"environment Scripted, seed 7, step 1: {line} (test_pool.py, line {number})"
    )


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (None, "step must return (messages, reward, terminated, truncated, info), got null"),
        ((HELLO, 1.0), "step must return (messages, reward, terminated, truncated, info), got 2 items"),
        ((HELLO, float("nan"), False, False, {}), "the reward must be a finite number, got nan"),
        (
            (HELLO, np.float32("inf"), False, False, {}),
            "the reward must be a finite number, got np.float32(inf)",
        ),
        ((HELLO, 1e300, False, False, {}), "the reward must be a finite number, got 1e+300"),
        ((HELLO, "1", False, False, {}), "the reward must be a finite number, got '1'"),
        ((HELLO, True, False, False, {}), "the reward must be a finite number, got True"),
        ((HELLO, 1.0, 0, False, {}), "terminated must be True or False, got 0"),
        ((HELLO, 1.0, False, False, 3), "info must be a dict, got 3"),
        (("hello", 1.0, False, False, {}), "the messages of step must be a list, got 'hello'"),
        (([], 1.0, False, False, {}), "step returned no message to answer, though the conversation goes on"),
        ((["hello"], 1.0, False, False, {}), "step: messages[0] must be {role: …, content: …}, got 'hello'"),
        (
            ([{"role": "robot", "content": ""}], 1.0, False, False, {}),
            "step: messages[0].role is 'robot'; known: assistant, developer, system, tool, user",
        ),
        (
            ([{"role": "user", "content": 3}], 1.0, False, False, {}),
            "step: messages[0].content must be a text, got 3",
        ),
        (
            ([{"role": "assistant", "content": ""}], 1.0, False, False, {}),
            "step returned a message of the assistant, which is the policy itself",
        ),
        ((HELLO * 2000, 1.0, False, False, {}), "step returned 2,000 messages at once, at most 1,024"),
    ],
)
def test_a_step_that_returns_something_else_is_one_line(returned, line):
    assert reply_to(returned).failure == f"environment Scripted, seed 7, step 1: {line}"


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ([], "reset returned no message to answer"),
        ("hello", "the messages of reset must be a list, got 'hello'"),
        (
            [*HELLO, {"role": "assistant", "content": "a"}],
            "the last message of reset is of the assistant, which is the policy itself",
        ),
    ],
)
def test_a_reset_that_returns_something_else_is_one_line(returned, line):
    pool = worlds(Scripted(at_reset=lambda *_: returned))
    pool.reset(0, 5, {})
    assert pool.finished()[0].failure == f"environment Scripted, seed 5, reset: {line}"


def test_numbers_of_numpy_are_numbers_and_the_info_keeps_what_can_be_logged():
    info = {"score": np.float64(2.5), "name": "x", "bad": float("nan"), "won": True}
    reply = reply_to(([], np.float32(0.25), np.bool_(True), False, info))
    assert reply == Reply(0, (), 0.25, True, False, {"score": 2.5, "won": 1.0})
    assert type(reply.reward) is float


def test_a_flood_is_cut_at_its_start_and_counted():
    flood = [{"role": "tool", "content": "a" * 2**20}, {"role": "user", "content": "more"}]
    pool = worlds(Scripted([(flood, 0.0, False, False, {})]), most_letters=10)
    pool.reset(0, 0, {})
    pool.finished()
    pool.step(0, "")
    (reply,) = pool.finished()
    contents = [message["content"] for message in reply.messages]
    assert contents == ["a" * 10 + "[cut: 1,048,566 letters]", "[cut: 4 letters]"]
    assert pool.take_counts()["cut_letters"] == 2**20 - 10 + 4


def test_half_a_character_which_no_tokenizer_reads_is_replaced():
    assert (
        reply_to(([{"role": "user", "content": "a\ud83d"}], 0, True, False, {})).messages[0]["content"] == "a?"
    )


def test_another_try_begins_with_the_same_seed_and_row_and_gives_the_same_answers():
    failed = []

    def once(world, text):
        if not failed:
            failed.append(text)
            raise OSError("the line is down")
        return Step([{"role": "user", "content": f"{world.row} {text}"}], 1.0, True)

    settings = Scripted([echo, once])
    pool = worlds(settings, retries=1)
    pool.reset(0, 9, {"x": 1})
    pool.finished()
    pool.step(0, "first")
    pool.finished()
    pool.step(0, "second")
    (reply,) = pool.finished()
    assert reply == Reply(0, ({"role": "user", "content": "{'x': 1} second"},), 1.0, True)
    assert [(world.seed, world.number) for world in settings.made] == [(9, 2), (9, 2)]
    assert pool.take_counts() == {"failures": 1, "timeouts": 0, "retries": 1, "cut_letters": 0}


def test_another_try_that_replies_otherwise_than_before_has_failed_too():
    calls = itertools.count()

    def random_reply(world, text):
        return [{"role": "user", "content": str(next(calls))}], 0.0, False, False, {}

    def broken(world, text):
        raise OSError("down")

    pool = worlds(Scripted([random_reply, broken]), retries=2)
    pool.reset(0, 0, {})
    pool.finished()
    pool.step(0, "a")
    pool.finished()
    pool.step(0, "b")
    (reply,) = pool.finished()
    assert reply.failure.startswith("environment Scripted, seed 0, step 2: OSError: down")
    assert pool.take_counts()["retries"] == 2

    working = worlds(
        Scripted([random_reply, lambda *a: broken(*a) if next(calls) < 3 else echo(*a)]), retries=1
    )
    calls = itertools.count()
    working.reset(0, 0, {})
    working.finished()
    working.step(0, "a")
    working.finished()
    working.step(0, "b")
    (reply,) = working.finished()
    assert reply.failure == (
        "environment Scripted, seed 0, step 1: "
        "not deterministic: it replied otherwise when it was begun again with the same seed"
    )


def test_the_time_is_that_of_one_call_also_where_earlier_ones_are_made_again():
    slow = itertools.count()

    def sometimes(world, text):
        if next(slow) == 0:
            raise OSError("down")
        return [], 0.0, True, False, {}

    def calm(world, text):
        time.sleep(0.15)
        return HELLO, 0.0, False, False, {}

    pool = worlds(Scripted([calm, calm, calm, sometimes]), timeout_seconds=0.35, retries=1)
    pool.reset(0, 0, {})
    pool.finished()
    for text in "abc":
        pool.step(0, text)
        assert pool.finished()[0].failure is None
    pool.step(0, "d")
    assert pool.finished()[0].terminated  # after 0.45 s of earlier calls


def test_a_request_to_stop_ends_the_wait():
    pool = worlds(Scripted(at_reset=hang))
    pool.reset(0, 0, {})
    waiting.ask_to_stop()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.finished()
    finally:
        waiting.go_on()


def test_a_beginning_that_is_longer_than_is_read_is_a_failure_and_never_cut():
    pool = worlds(
        Scripted(at_reset=lambda world, _: [{"role": "user", "content": "x" * 2000}]), most_letters=1500
    )
    pool.reset(0, 0, {})
    (reply,) = pool.finished(5.0)
    assert "its first messages have 500 letters more than are read, 1,500" in reply.failure
