import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hybrid_jax.experiment import load_config, plan_phases
from hybrid_jax.training.horizons import horizons, say_what_stays
from hybrid_jax.training.scheduler import Alternation, Curriculum, Ratio, Triggered, planned_steps
from hybrid_jax.training.state import ScheduleState

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "hybrid.yaml"
LETTERS = {"sft": "s", "ppo": "p"}
PAIR = {"first": "sft", "second": "ppo"}


def play(scheduler, steps, state=None, metrics=lambda step: {}):
    """The first letters of the phases that ``scheduler`` chooses, and its state after them."""
    state, chosen = state or ScheduleState(), ""
    for step in range(steps):
        phase = scheduler.choose(state)
        state = scheduler.update(state, phase, metrics(step))
        chosen += LETTERS[phase]
    return chosen, state


def test_alternation_plays_its_warmup_once_and_its_cycle_for_ever():
    scheduler = Alternation(warmup={"sft": 2, "ppo": 1}, cycle={"ppo": 3, "sft": 1})
    assert play(scheduler, 16)[0] == "ssp" + "ppps" * 3 + "p"


def test_alternation_skips_a_phase_with_no_steps():
    assert play(Alternation(cycle={"sft": 0, "ppo": 2}), 5)[0] == "ppppp"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "ssssssssssss"),
        (0.25, "sssp" * 3),
        (1 / 3, "ssp" * 4),
        (0.4, "sspsp" * 2 + "ss"),
        (0.5, "sp" * 6),
        (0.75, "sppp" * 3),
        (1.0, "pppppppppppp"),
    ],
)
def test_a_ratio_runs_the_second_phase_as_soon_as_it_is_owed_a_whole_step(share, expected):
    assert play(Ratio(**PAIR, share=share), 12)[0] == expected


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.7, 0.9])
def test_a_share_that_is_no_binary_fraction_is_exact_after_a_thousand_steps(share):
    chosen, _ = play(Ratio(**PAIR, share=share), 1000)
    assert chosen.count("p") == round(1000 * share)
    for end in range(0, 1001, 10):  # and in every ten steps before
        assert chosen[:end].count("p") == round(end * share)


def test_a_linear_curriculum_adds_up_its_shares():
    # Shares 0, .25, .5, .75, 1, 1 sum to 0, .25, .75, 1.5, 2.5, 3.5: one is due at steps 4, 5 and 6.
    assert play(Curriculum(**PAIR, end_step=4, start=0.0, end=1.0), 6)[0] == "sssppp"


def test_a_cosine_curriculum_starts_later_and_ends_steeper():
    # (1 - cos πu) / 2 at u = 0, 1/6, …, 1 is 0, .067, .25, .5, .75, .933, 1;
    # the sums are 0, .067, .317, .817, 1.567, 2.5, 3.5.
    assert play(Curriculum(**PAIR, end_step=6, start=0.0, end=1.0, shape="cosine"), 7)[0] == "ssssppp"
    # A straight line from 0 to 1: sums 0, 1/6, 1/2, 1, 5/3, 5/2, 7/2.
    assert play(Curriculum(**PAIR, end_step=6, start=0.0, end=1.0), 7)[0] == "sssp" + "spp"


def test_a_step_curriculum_jumps_at_its_end_and_a_curriculum_waits_for_its_begin():
    assert play(Curriculum(**PAIR, end_step=3, start=0.0, end=1.0, shape="step"), 6)[0] == "sssppp"
    # u is 0 up to step 2, then .5, then 1: shares 0, 0, 0, .5, 1, 1.
    assert play(Curriculum(**PAIR, begin_step=2, end_step=4, start=0.0, end=1.0), 6)[0] == "sssspp"


def test_a_trigger_is_pulled_by_its_metric_and_stays_pulled():
    losses = [5.0, 3.0, 1.9, 4.0, 4.0, 4.0, 4.0, 4.0]
    scheduler = Triggered(**PAIR, metric="sft/loss", below=2.0, after=0.5)
    chosen, state = play(scheduler, 8, metrics=lambda step: {"sft/loss": losses[step]})
    assert chosen == "sss" + "spsps"
    assert state.triggered


def test_a_trigger_above_a_threshold_ignores_steps_that_do_not_log_its_metric():
    scheduler = Triggered(**PAIR, metric="ppo/score", above=0.0, before=0.5, after=1.0)
    scores = {1: {"ppo/score": -1.0}, 2: {"sft/loss": 9.0}, 3: {"ppo/score": 0.1}}
    chosen, _ = play(scheduler, 7, metrics=lambda step: scores.get(step, {}))
    assert chosen == "spsp" + "ppp"


SCHEDULERS = [
    Alternation(warmup={"sft": 3}, cycle={"ppo": 2, "sft": 1}),
    Ratio(**PAIR, share=0.3),
    Curriculum(**PAIR, end_step=20, start=0.1, end=0.9, shape="cosine"),
    Triggered(**PAIR, metric="sft/loss", below=2.0, before=0.1, after=0.7),
]
PLANNED = [scheduler for scheduler in SCHEDULERS if not isinstance(scheduler, Triggered)]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("cut", [0, 1, 7, 23])
def test_a_schedule_goes_on_from_its_state_in_json_as_if_it_had_never_stopped(scheduler, cut):
    def metrics(step):
        return {"sft/loss": 5.0 - 0.3 * step}

    whole, end = play(scheduler, 40, metrics=metrics)
    first, state = play(scheduler, cut, metrics=metrics)
    state = ScheduleState(**json.loads(json.dumps(dataclasses.asdict(state))))
    rest, resumed_end = play(scheduler, 40 - cut, state, metrics=lambda step: metrics(step + cut))
    assert first + rest == whole
    assert resumed_end == end


@pytest.mark.parametrize("scheduler", PLANNED, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("total", [0, 1, 10, 33])
def test_planned_steps_are_those_that_are_played(scheduler, total):
    chosen, _ = play(scheduler, total)
    planned = planned_steps(scheduler, total)
    assert planned == {phase: chosen.count(LETTERS[phase]) for phase in scheduler.phases}


LOOKS = {
    "an item": lambda metrics: metrics["sft/loss"],
    "an item that may be missing": lambda metrics: metrics.get("sft/loss", 0.0),
    "whether there is one": lambda metrics: "sft/loss" in metrics,
    "whether there are any": bool,
    "all of them": dict,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_steps_that_a_metric_decides_are_not_guessed(look):
    class Users(Alternation):
        """Any scheduler of a user that looks at what it is given, however late."""

        def update(self, state, phase, metrics):
            if sum(state.steps.values()) == 5:
                look(metrics)
            return super().update(state, phase, metrics)

    scheduler = Users(cycle={"sft": 1, "ppo": 1})
    assert planned_steps(scheduler, 5) == {"sft": 3, "ppo": 2}
    assert planned_steps(scheduler, 6) == {"sft": None, "ppo": None}
    assert planned_steps(Triggered(**PAIR, metric="sft/loss", below=1.0), 9) == {"sft": None, "ppo": None}


def test_a_rate_does_not_decay_to_a_horizon_that_a_metric_decides(caplog):
    """The rates of PPO were 1e-5 and then 0: it was taken to have one step."""
    overrides = [
        "steps=10",
        "scheduler={name: triggered, first: sft, second: ppo, metric: sft/loss, below: 100.0, before: 0.0}",
    ]
    config = load_config(CONFIG, overrides)
    ppo: Any = plan_phases(config)[0]["ppo"]
    assert [float(ppo._rate(step, ppo._horizon)) for step in range(4)] == pytest.approx([1e-5] * 4)
    with caplog.at_level("INFO"):
        say_what_stays(config.phases, horizons(config.scheduler, config.steps))
    assert caplog.messages == [
        f"the learning rate of {name} stays at {rate}: a metric decides how many steps the phase gets; "
        f"phases.{name}.optimizer.schedule.steps=N lets it decay over N of them"
        for name, rate in (("sft", "0.001"), ("ppo", "1e-05"))
    ]
    config = load_config(CONFIG, [*overrides, "phases.ppo.optimizer.schedule.steps=4"])
    ppo = plan_phases(config)[0]["ppo"]
    rates = [float(ppo._rate(step, ppo._horizon)) for step in range(6)]
    assert rates == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6, 0, 0])


def test_entries_count_how_often_each_phase_was_entered():
    _, state = play(Alternation(warmup={"sft": 2}, cycle={"ppo": 2, "sft": 1}), 9)  # ss pps pps p
    assert state.steps == {"sft": 4, "ppo": 5}
    assert state.entries == {"sft": 3, "ppo": 3}
    assert state.last == "ppo"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Alternation(cycle={"sft": 0}), "cycle must hold at least one step"),
        (lambda: Alternation(cycle={"sft": -1, "ppo": 2}), "at least 0"),
        (lambda: Ratio(**PAIR, share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (
            lambda: Curriculum(**PAIR, begin_step=5, end_step=5),
            "end_step must be greater than begin_step 5, got 5",
        ),
        (lambda: Triggered(**PAIR, metric="sft/loss"), "below or above must be given"),
        (lambda: Triggered(**PAIR, metric="sft/loss", below=1.0, above=2.0), "only one of them"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
