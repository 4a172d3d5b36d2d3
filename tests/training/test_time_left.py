"""The time that is left: each phase by its own cost, compilation and unknown plans."""

from types import SimpleNamespace

import pytest

from hybrid_jax.training.scheduler import Alternation
from hybrid_jax.training.state import RunState
from hybrid_jax.training.time_left import TimeLeft, relative_costs, steps_ahead


def test_nothing_is_said_before_a_step_without_compilation():
    left = TimeLeft(["sft"] * 10)
    assert left.seconds(10) is None
    left.took("evaluation", 2.0)
    left.took("sft", 60.0, compiling=50.0)
    assert left.seconds(9) is None
    left.took("sft", 0.5)
    assert left.seconds(8) == 8 * 0.5


def test_compilation_does_not_count():
    left = TimeLeft(["sft"] * 590)
    left.took("sft", 30.0, compiling=29.0)
    for _ in range(19):
        left.took("sft", 0.1)
    assert left.seconds(570) == pytest.approx(57.0)


def test_each_phase_counts_by_its_own_cost_and_evaluations_too():
    left = TimeLeft([*["sft"] * 3, "evaluation", *["ppo", "ppo", "sft"] * 2, "evaluation"])
    left.took("sft", 1.0)
    left.took("evaluation", 9.0, compiling=7.0)  # all that is known of an evaluation: 2 s
    left.took("ppo", 10.0)
    assert left.seconds(7) == 4 * 1.0 + 3 * 10.0 + 1 * 2.0


def test_a_phase_that_has_not_run_is_guessed_by_its_work():
    left = TimeLeft([*["sft"] * 4, *["ppo"] * 2], costs={"sft": 100.0, "ppo": 900.0})
    left.took("sft", 0.5)
    assert left.is_guess
    assert left.seconds(5) == 3 * 0.5 + 2 * 4.5
    left.took("ppo", 3.0)
    assert not left.is_guess
    assert left.seconds(4) == 3 * 0.5 + 1 * 3.0


def test_a_phase_of_unknown_work_is_taken_to_cost_as_much_as_the_others():
    left = TimeLeft(["sft", "sft", "mine"], costs={"sft": 100.0})
    left.took("sft", 0.5)
    assert left.seconds(2) == 0.5 + 0.5


def test_once_the_plan_is_left_the_newest_steps_are_the_plan():
    left = TimeLeft([*["sft"] * 10, "evaluation"])  # a scheduler that waits for a metric
    left.took("evaluation", 4.0)
    left.took("sft", 1.0)
    left.took("ppo", 3.0)
    left.took("ppo", 3.0)
    assert left.seconds(7) == pytest.approx(7 * (1.0 + 3.0 + 3.0) / 3)


def test_what_is_ahead_are_the_steps_of_the_scheduler_and_the_evaluations_between_them():
    run = SimpleNamespace(
        steps=5,
        scheduler=Alternation(cycle={"sft": 1, "ppo": 2}, warmup={"sft": 1}),
        evaluation_is_due=lambda state, phase: state.step == 5 or phase not in state.schedule.steps,
    )
    rest = ["sft", "evaluation", "ppo", "ppo", "sft", "evaluation"]
    assert list(steps_ahead(run, RunState(step=0, train=None))) == ["evaluation", "sft", *rest]


def test_learning_a_token_is_three_times_the_work_of_reading_it():
    def phase(*programs):
        return SimpleNamespace(
            programs=lambda state: [SimpleNamespace(tokens=t, learns=learns) for t, learns in programs]
        )

    class Silent:
        def programs(self, state):
            raise NotImplementedError

    phases = {"sft": phase((10, True)), "ppo": phase((8, False), (12, False), (24, True)), "mine": Silent()}
    assert relative_costs(phases, state=None) == {"sft": 30.0, "ppo": 92.0}
