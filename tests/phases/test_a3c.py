"""A3C: one actor is A2C, several are asynchronous, none is waited for or thrown away, a run resumes."""

import json
import sys
import threading
import types
from collections import Counter
from concurrent.futures import Future

import jax
import numpy as np
import pytest
import yaml

from hybrid_jax import build, load_config
from hybrid_jax.core import waiting
from hybrid_jax.core.errors import UserError
from hybrid_jax.phases.actors import Actors, Begun
from hybrid_jax.testing import TINY, tiny_rows
from hybrid_jax.training.interrupts import Interrupted
from hybrid_jax.training.loop import take_step, train

ROWS = 4


class Reward:
    """Remembers what it scored, and may hold up one actor or end it."""

    def __init__(self):
        self.scored: list[tuple[str, int]] = []  # prompt and length
        self.lock, self.free = threading.Lock(), threading.Event()
        self.slow: str | None = None  # the actor that waits until it is free
        self.error: BaseException | None = None
        self.by_actor: Counter[str] = Counter()

    def __call__(self, prompts, responses):
        actor = threading.current_thread().name.split()[-1]
        if actor == self.slow:
            assert self.free.wait(60)
        with self.lock:
            if self.error is not None:
                raise self.error
            self.by_actor[actor] += 1
            self.scored += [(p, len(r.encode())) for p, r in zip(prompts, responses, strict=True)]
        return [float(len(response) % 3) for response in responses]


@pytest.fixture
def reward(monkeypatch):
    """The reward that the config names."""
    module, reward = types.ModuleType("scored_here"), Reward()
    module.reward = lambda prompts, responses: reward(prompts, responses)  # type: ignore
    monkeypatch.setitem(sys.modules, "scored_here", module)
    yield reward
    reward.free.set()


@pytest.fixture
def experiment(tmp_path, reward):
    """``experiment(kind, steps, **settings)`` builds a run of one phase, ``rl``."""

    def make(kind="a3c", steps=6, folder="run", mesh=None, **settings):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny_rows(50))))
        phase = {
            "name": kind,
            "prompts_per_step": ROWS,
            "sampler": {"max_new_tokens": 6},
            "reward": {"parts": {"x": {"reward": {"name": "scored_here:reward"}}}},
            "optimizer": {"name": "adam", "learning_rate": 1e-2},
            "kl_control": {"name": "adaptive"},
            **settings,
        }
        data = {"name": "jsonl", "train": str(tmp_path / "rows.jsonl"), "held_out_fraction": 0.2}
        config = {
            **TINY,
            "run_dir": str(tmp_path / folder),
            "steps": steps,
            "mesh": mesh or {},
            "data": data,
            "phases": {"rl": phase},
            "scheduler": {"name": "alternation", "cycle": {"rl": 1}},
            "evaluation": {"num_prompts": 0, "num_examples": 0, "num_shown": 0},
            "checkpoint": {"every": 2},
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        return build(load_config(file))

    return make


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def steps(built, count, state=None):
    """The state after some steps, and the metrics of each."""
    state, phase, metrics = built.init() if state is None else state, built.phases["rl"], []
    step = type(phase).step

    def recorded(state, key):
        state, numbers = step(phase, state, key)
        metrics.append({name.removeprefix("rl/"): float(number) for name, number in numbers.items()})
        return state, numbers

    phase.step = recorded
    for _ in range(count):
        state = take_step(built, phase, state)
    del phase.step
    return state, metrics


def test_one_actor_is_a2c_bit_for_bit(experiment):
    one, of_one = steps(experiment("a3c", actors=1), 4)
    plain, of_plain = steps(experiment("a2c"), 4)
    assert bits(one.train) == bits(plain.train)
    assert one.cursors == plain.cursors
    for a, b in zip(of_one, of_plain, strict=True):
        assert {n: x for n, x in b.items() if not n.endswith("_seconds")}.items() <= a.items()
    assert [metrics["staleness"] for metrics in of_one] == [0] * 4


@pytest.mark.slow
def test_one_actor_with_vtrace_is_a2c_up_to_rounding(experiment):
    """The compiler may round the probabilities of two programs apart, of which V-trace takes the ratio."""
    one, _ = steps(experiment("a3c", actors=1, advantage={"name": "vtrace"}), 3)
    plain, _ = steps(experiment("a2c", advantage={"name": "vtrace"}), 3)
    for a, b in zip(jax.tree.leaves(one.train.params), jax.tree.leaves(plain.train.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("advantage", ["n_step", "vtrace"])
def test_four_actors_overtake_each_other_and_all_that_is_sampled_is_learned(experiment, reward, advantage):
    count = 12
    state, metrics = steps(experiment(steps=count, actors=4, advantage={"name": advantage}), count)
    stale = [int(numbers["staleness"]) for numbers in metrics]
    assert max(stale) > 0
    histogram = np.bincount(stale, minlength=8) / count
    np.testing.assert_allclose([metrics[-1][f"staleness_{n}"] for n in range(8)], histogram)
    # Nothing is left under way, nothing was thrown away: as many were scored as learned, of the same length.
    assert len(reward.scored) == count * ROWS
    assert state.cursors == {"rl": count * ROWS}
    assert sum(numbers["tokens"] for numbers in metrics) == pytest.approx(
        sum(numbers["response_length"] for numbers in metrics) * ROWS
    )
    assert max(Counter(prompt for prompt, _ in reward.scored).values()) == 2  # 48 answers to 40 prompts
    assert len(reward.by_actor) == 4


def test_a_slow_actor_holds_up_nobody_and_its_rollout_is_learned_in_the_end(experiment, reward):
    """Ten updates of the others while one reward does not answer; then that one, ten and more updates stale."""
    built = experiment(steps=20, actors=4)
    state, _ = steps(built, 1)
    reward.slow = "3"
    state, metrics = steps(built, 10, state)
    assert reward.by_actor["3"] == 0
    assert sum(reward.by_actor.values()) >= 11
    reward.free.set()
    state, more = steps(built, 9, state)
    assert max(numbers["staleness"] for numbers in metrics) <= 3 < 10 <= max(m["staleness"] for m in more)
    assert len(reward.scored) == 20 * ROWS


def test_staleness_is_bounded_by_who_may_begin(experiment, reward):
    """Three updates may overtake; then the others wait for the slow one, and its rollout is not lost."""
    built = experiment(steps=20, actors=3, max_staleness=3)
    state, _ = steps(built, 1)
    reward.slow = "2"
    threading.Timer(3.0, reward.free.set).start()
    state, metrics = steps(built, 19, state)
    assert max(numbers["staleness"] for numbers in metrics) == 3
    assert len(reward.scored) == 20 * ROWS


def test_an_actor_may_begin_while_no_other_can_be_overtaken_too_often():
    actors = Actors("a3c", 3, max_staleness=4)
    assert [actors.may_begin(0, at_most) for at_most in (1, 0)] == [True, False]
    actors.under_way = [Begun(0, 0, 0, Future()), Begun(1, 2, 8, Future())]
    assert actors.may_begin(2, 9)  # the first is overtaken by 2 updates until now, and by two others
    assert not actors.may_begin(3, 9)
    assert not actors.may_begin(2, 2)  # two updates are left, for those two


def test_a_reward_that_raises_in_an_actor_ends_the_run_with_its_line(experiment, reward):
    built = experiment(actors=3)
    state, _ = steps(built, 2)
    reward.error = ValueError("no answer")
    with pytest.raises(UserError, match=r"reward 'x' raised ValueError: no answer") as raised:
        steps(built, 4, state)
    assert "\n" not in str(raised.value)


def test_an_actor_that_is_ended_ends_the_run_with_one_line(experiment, monkeypatch):
    built = experiment(actors=2)
    phase = built.phases["rl"]
    state, _ = steps(built, 1)
    monkeypatch.setattr(phase.rollouts, "answer", lambda *_: sys.exit(3))
    with pytest.raises(
        UserError, match=r"^phases\.rl: actor \d was ended by SystemExit; the same command goes on$"
    ):
        steps(built, 3, state)


def test_a_signal_is_obeyed_while_a_reward_does_not_answer(experiment, reward):
    """The state before the step is complete, so the loop can save it."""
    built = experiment(actors=1)
    state, _ = steps(built, 1)
    reward.slow = "0"
    waiting.ask_to_stop()
    try:
        with pytest.raises(waiting.Stopped):
            steps(built, 1, state)
    finally:
        waiting.go_on()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.train))


def test_a_run_of_several_actors_resumes_from_the_bits_that_were_saved_and_answers_what_was_under_way(
    experiment, reward, monkeypatch
):
    first = experiment(steps=8, actors=3)
    saved, step = {}, first.phases["rl"].step

    def stopping(state, key):
        if state.step == 4:  # as after a kill: the newest checkpoint is that of this step
            saved["state"] = state
            raise Interrupted(15)
        return step(state, key)

    first.phases["rl"].step = stopping
    with pytest.raises(Interrupted):
        train(first)
    begun = {name: cursor for name, cursor in saved["state"].cursors.items() if "actor" in name}
    assert len(begun) == 2  # of three actors, one has just sent its gradient

    again = experiment(steps=8, actors=3)
    state = again.begin()
    assert state.step == 4
    assert bits(state.train) == bits(saved["state"].train)
    assert bits(state.host) == bits(saved["state"].host)
    assert state.cursors == saved["state"].cursors
    asked, batch = [], again.phases["rl"].rollouts.prompts.batch
    monkeypatch.setattr(
        again.phases["rl"].rollouts.prompts,
        "batch",
        lambda c, n, **more: asked.append(c) or batch(c, n, **more),
    )
    end = train(again)
    assert end.cursors == {"rl": 8 * ROWS}
    asked = [cursor for cursor in asked if cursor]  # the first are only measured
    assert set(asked[:2]) == set(begun.values())
    assert len(asked) == len(set(asked)) == 4


@pytest.mark.slow
def test_one_actor_resumes_to_the_bits_of_an_unbroken_run(experiment):
    whole = train(experiment(steps=4, actors=1, folder="whole"))
    state, _ = steps(experiment(steps=4, actors=1), 2)
    resumed, _ = steps(experiment(steps=4, actors=1), 2, state)  # a new process knows only the state
    assert bits(resumed.train) == bits(whole.train)
    assert resumed.cursors == whole.cursors


@pytest.mark.slow
def test_on_several_devices_each_actor_has_one_of_its_own(experiment):
    built = experiment(actors=4, mesh={"data": 2})
    phase, places = built.phases["rl"], []
    for number, gradient in enumerate(phase._gradients):

        def placed(*inputs, number=number, gradient=gradient, **settings):
            result = gradient(*inputs, **settings)
            places.append((number, *{next(iter(leaf.devices())).id for leaf in jax.tree.leaves(result[0])}))
            return result

        phase._gradients[number] = placed
    state, _ = steps(built, 6)
    assert set(places) == {(0, 0), (1, 1)}
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(state.train.params)} == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": 2}, r"max_staleness must be at least actors - 1 = 3, got 2"),
        ({"epochs": 2}, r"epochs must be 1 for actors, each update is one gradient; got 2"),
        ({"minibatches": 2}, r"minibatches must be 1"),
        ({"rollout_ahead": True}, r"rollout_ahead must be False"),
        (
            {"advantage": {"name": "vtrace"}, "correction": {}},
            r"correction must be null for an advantage that weighs by ratios itself, as vtrace",
        ),
    ],
)
def test_settings_that_actors_cannot_have_are_refused(experiment, settings, message):
    with pytest.raises(UserError, match=message):
        experiment(**settings)
