"""Which metrics share a chart of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    metric: str
    label: str
    colour: str = ""  # that of its phase unless said


@dataclass(frozen=True)
class Chart:
    """A chart's title and its panels: the lines of each and a value that its axis must reach down to."""

    title: str
    panels: Sequence[tuple[Sequence[Line], float | None]]
    glossary: str | None  # the entry that is printed beneath
    band: tuple[str, str] | None = None  # metrics: the area between them is shaded in the first panel


def pair(name: str) -> list[Line]:
    return [Line(f"ppo/{name}", "training"), Line(f"evaluation/{name}", "held-out")]


def _both(name: str) -> list[Line]:
    return [Line(f"sft/{name}", "SFT"), Line(f"ppo/{name}", "PPO")]


def _alone(title: str, name: str, floor: float | None = None) -> Chart:
    return Chart(title, [(pair(name), floor)], name)


HEADLINE_CHARTS = [
    _alone("Score", "score"),
    Chart(
        "KL to the reference",
        [(pair("kl"), 0.0), ([Line("ppo/kl_coef", "coefficient", "fourth")], 0.0)],
        "kl",
    ),
]
SCORER_CHARTS = [  # of a run that trains a classifier or a reward model
    Chart(
        "Accuracy",
        [
            (
                [
                    Line("evaluation/accuracy", "held-out"),
                    Line("evaluation/length_balanced_accuracy", "length balanced", "sft"),
                    Line("evaluation/longer_wins", "the longer wins", "fourth"),
                ],
                None,
            )
        ],
        "accuracy",
    ),
    Chart(
        "Loss",
        [
            (
                [
                    Line("classifier/loss", "training"),
                    Line("reward_model/loss", "training"),
                    Line("evaluation/loss", "held-out"),
                ],
                None,
            )
        ],
        "scorer_loss",
    ),
]
CHARTS = [
    Chart(
        "Language-model loss",
        [([Line("sft/loss", "training"), Line("evaluation/loss", "held-out")], None)],
        "loss",
    ),
    _alone("Perplexity", "perplexity"),
    _alone("Policy loss", "policy_loss"),
    _alone("Value loss", "value_loss", 0.0),
    _alone("Explained variance", "explained_variance"),
    _alone("Clip fraction", "clip_fraction", 0.0),
    _alone("Size of an update", "approx_kl", 0.0),
    _alone("Entropy", "entropy", 0.0),
    _alone("Response length", "response_length"),
    _alone("Responses that end", "eos_fraction"),
    _alone("Spread of the scores", "score_std", 0.0),
    Chart(
        "What training receives",
        [([Line("ppo/shaped_score", "shaped score"), Line("ppo/penalty", "penalty", "fourth")], None)],
        "shaped_score",
    ),
    _alone("KL, k3 estimate", "kl_k3", 0.0),
    Chart("Learning rate", [(_both("learning_rate"), 0.0)], "learning_rate"),
    Chart("Gradient norm", [(_both("grad_norm"), 0.0)], "grad_norm"),
    Chart("Loss scale", [(_both("loss_scale"), None)], "loss_scale"),
]
SPEED_CHARTS = [
    Chart("Throughput, tokens a second", [(_both("tokens_per_second"), 0.0)], "tokens_per_second"),
    Chart("Utilisation (MFU)", [(_both("mfu"), 0.0)], "mfu"),
    Chart("Seconds a step", [(_both("seconds"), 0.0)], "seconds"),
    Chart(
        "Where a PPO step goes, seconds",
        [
            (
                [
                    Line("ppo/rollout_seconds", "rollout"),
                    Line("ppo/update_seconds", "update", "sft"),
                    Line("ppo/reward_seconds", "rewards", "fourth"),
                    Line("ppo/score_seconds", "score", "eval"),
                    Line("ppo/input_seconds", "input", "other"),
                ],
                0.0,
            )
        ],
        "rollout_seconds",
    ),
    Chart(
        "Where an SFT step goes, seconds",
        [([Line("sft/update_seconds", "update"), Line("sft/input_seconds", "input", "other")], 0.0)],
        "input_seconds",
    ),
    Chart(
        "Peak memory of a device, bytes", [([Line("memory/peak_bytes", "device")], 0.0)], "memory/peak_bytes"
    ),
    Chart(
        "Peak memory of the process, bytes",
        [([Line("memory/host_peak_bytes", "host")], 0.0)],
        "memory/host_peak_bytes",
    ),
    Chart(
        "Compilation",
        [([Line("compile/count", "programs")], 0.0), ([Line("compile/seconds", "seconds", "fourth")], 0.0)],
        "compile/count",
    ),
    Chart(
        "Between two steps, seconds",
        [
            (
                [
                    Line("time/evaluation_seconds", "evaluation", "eval"),
                    Line("time/checkpoint_seconds", "checkpoint", "fourth"),
                ],
                0.0,
            )
        ],
        "time/checkpoint_seconds",
    ),
]
_MANY = ("ppo", "sft", "fourth", "eval", "other")  # the colours of lines that only their names tell apart


def part_chart(part: str) -> Chart:
    """A part's mean in training and held-out, within the distribution over the responses of a rollout."""
    name = f"reward/{part}"
    lines = [*pair(name), Line(f"ppo/{name}_p50", "median", "ppo median")]
    return Chart(part, [(lines, None)], None, band=(f"ppo/{name}_p10", f"ppo/{name}_p90"))


def judge_chart(judge: str) -> Chart:
    return Chart(f"Judge: {judge}", [([Line(f"evaluation/judge/{judge}", "held-out")], None)], "judge")


def combination_charts(parts: Sequence[str]) -> list[Chart]:
    """How the parts became one score: whatever the run's combiner logged."""

    def of_each(ending: str) -> list[Line]:
        return [Line(f"ppo/reward/{part}{ending}", part, many_colour(i)) for i, part in enumerate(parts)]

    def entropy(name: str) -> list[Line]:
        return [Line(f"ppo/reward/{name}_entropy", "entropy", "fourth")]

    arm = Line("ppo/reward/bandit_arm", "part that it tries, from 0", "other")
    bandit = [(entropy("bandit"), 0.0), ([arm], 0.0)]
    shares = [
        Line("ppo/reward/gate_open_fraction", "gate open"),
        Line("ppo/reward/aspects_fraction", "aspects count", "fourth"),
    ]
    return [
        Chart("Weights", [(of_each("_weight"), 0.0)], "_weight"),
        Chart("The gate's shares", [(of_each("_gate"), 0.0), (entropy("gate"), 0.0)], "_gate"),
        Chart("The bandit's chances", [(of_each("_probability"), 0.0), *bandit], "_probability"),
        Chart("Multipliers", [(of_each("_multiplier"), 0.0), (of_each("_excess"), None)], "_multiplier"),
        Chart("Responses let through", [(shares, 0.0)], "reward/gate_open_fraction"),
        Chart("Spread within a rollout", [(of_each("_std"), 0.0)], "_std"),
        Chart("Clipped rows", [(of_each("_clip_fraction"), 0.0)], "_clip_fraction"),
        _alone("Score for a token more", "score_length_slope"),
    ]


def many_colour(number: int) -> str:
    """A second round of the same colours is dashed."""
    return _MANY[number % len(_MANY)] + (" dashed" if number >= len(_MANY) else "")
