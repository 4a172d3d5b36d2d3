"""Groups metrics into the charts of the report. A metric of several phases has a line for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybrid_jax.reports.charts import HELD_OUT, OTHER, SECOND
from hybrid_jax.reports.rewarded import Rewarded
from hybrid_jax.reports.run import Run
from hybrid_jax.reports.speed import PARTS


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

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


def by_phase(run: Run, name: str, phases: Sequence[str] | None = None, alone: Line | None = None) -> list[Line]:
    """A line for each phase that logs a metric.

    Args:
        run: whose phases they are.
        name: of the metric, without its phase.
        phases: to look at; None for all.
        alone: gives label and colour where a single phase logs it.
    """
    metrics = {f"{phase}/{name}": phase for phase in (run.kinds if phases is None else phases)}
    lines = [Line(metric, run.label(phase)) for metric, phase in metrics.items() if metric in run.curves]
    return [Line(lines[0].metric, alone.label, alone.colour)] if alone and len(lines) == 1 else lines


def _trained(run: Run, name: str, phases: Sequence[str] | None = None) -> list[Line]:
    return by_phase(run, name, phases, Line("", "training"))


def _held_out(run: Run, name: str, phases: Sequence[str] | None = None, of_model: bool = True) -> list[Line]:
    """Lines for what the evaluation measures, of the model (if ``of_model``) and of heads that phases train."""
    model = [Line(f"evaluation/{name}", "held-out")] if of_model and f"evaluation/{name}" in run.curves else []
    own = {f"evaluation/{phase}/{name}": phase for phase in (run.kinds if phases is None else phases)}
    measured = {metric: phase for metric, phase in own.items() if metric in run.curves}
    if len(measured) == 1 and not model:
        return [Line(metric, "held-out", HELD_OUT) for metric in measured]
    return model + [
        Line(metric, f"{run.label(phase)} held-out", f"{run.colour(phase)} dashed")
        for metric, phase in measured.items()
    ]


def _pair(run: Run, title: str, name: str, floor: float | None = None) -> Chart:
    return Chart(title, [([*_trained(run, name), *_held_out(run, name)], floor)], name)


def headline_charts(run: Run) -> tuple[list[Chart], list[Chart]]:
    """The charts that stand first, and those that replace them in a run without such numbers."""
    coefficient = by_phase(run, "kl_coef", alone=Line("", "coefficient", SECOND))
    kl = [*_trained(run, "kl"), *_held_out(run, "kl")]
    accuracy = [*_trained(run, "accuracy"), *_held_out(run, "accuracy")]
    for name, label, colour in (
        ("length_balanced_accuracy", "length balanced", OTHER),
        ("longer_wins", "the longer wins", SECOND),
    ):
        accuracy += [replace(line, label=label, colour=colour) for line in _held_out(run, name)]
    first = [
        _pair(run, "Score", "score"),
        Chart("KL to the reference", [(kl, 0.0), (coefficient, 0.0)], "kl"),
        Chart("Accuracy", [(accuracy, None)], "accuracy"),
    ]
    return first, [*loss_charts(run), _pair(run, "Perplexity", "perplexity")]


def loss_charts(run: Run) -> list[Chart]:
    """A chart for each kind of phase that logs a loss: those of two kinds are no two values of one quantity."""
    kinds: dict[str, list[str]] = {}
    for phase, kind in run.kinds.items():
        if f"{phase}/loss" in run.curves:
            kinds.setdefault(kind, []).append(phase)
    # The evaluation's own loss is of tokens, unless all that is trained are judgements of whole texts.
    evaluated = next((kind for kind, phases in kinds.items() if not judges(run, phases[0])), None)
    evaluated = next(iter(kinds), None) if evaluated is None else evaluated
    charts = []
    for kind, phases in kinds.items():
        held_out = _held_out(run, "loss", phases, of_model=kind == evaluated)
        title = "Loss" if len(kinds) == 1 else f"Loss: {' and '.join(map(run.label, phases))}"
        entry = loss_entry(run, f"{phases[0]}/loss")
        charts.append(Chart(title, [([*_trained(run, "loss", phases), *held_out], None)], entry))
    return charts or [Chart("Loss", [(_held_out(run, "loss"), None)], "loss")]


def judges(run: Run, phase: str) -> bool:
    """Tells whether a phase learns to tell texts apart, by their labels or by preferences."""
    return f"{phase}/accuracy" in run.curves


def loss_entry(run: Run, metric: str) -> str:
    """The glossary's entry about a loss, which is of tokens or of whole texts."""
    phase, _ = run.named(metric)
    whose = (phase,) if phase else run.kinds
    return "scorer_loss" if all(judges(run, each) for each in whose) else "loss"


def training_charts(run: Run) -> list[Chart]:
    """Charts of how the training went."""
    shaped = by_phase(run, "shaped_score", alone=Line("", "shaped score"))
    penalty = by_phase(run, "penalty", alone=Line("", "penalty", SECOND))
    return [
        _pair(run, "Policy loss", "policy_loss"),
        _pair(run, "Value loss", "value_loss", 0.0),
        _pair(run, "Explained variance", "explained_variance"),
        _pair(run, "Clip fraction", "clip_fraction", 0.0),
        _pair(run, "Size of an update", "approx_kl", 0.0),
        _pair(run, "Entropy", "entropy", 0.0),
        _pair(run, "Response length", "response_length"),
        _pair(run, "Responses that end", "eos_fraction"),
        _pair(run, "Return of a conversation", "return"),
        _pair(run, "Turns of a conversation", "turns", 0.0),
        _pair(run, "Conversations broken off", "truncated_fraction", 0.0),
        _pair(run, "Environments that failed", "failed_fraction", 0.0),
        _pair(run, "Tool errors", "world/tool_errors", 0.0),
        _pair(run, "Spread of the scores", "score_std", 0.0),
        Chart("What training receives", [(shaped, None), (penalty, 0.0)], "shaped_score"),
        _pair(run, "KL, k3 estimate", "kl_k3", 0.0),
        _of_phases(run, "Learning rate", "learning_rate"),
        _of_phases(run, "Gradient norm", "grad_norm"),
        _of_phases(run, "Loss scale", "loss_scale", None),
    ]


def _of_phases(run: Run, title: str, name: str, floor: float | None = 0.0) -> Chart:
    return Chart(title, [(by_phase(run, name), floor)], name)


def speed_charts(run: Run) -> list[Chart]:
    """Charts of the speed of a run, and of the memory that it needed."""
    device = [Line("memory/peak_bytes", "device")]
    host = [Line("memory/host_peak_bytes", "host")]
    programs, seconds = [Line("compile/count", "programs")], [Line("compile/seconds", "seconds", SECOND)]
    between = [
        Line("time/evaluation_seconds", "evaluation", HELD_OUT),
        Line("time/checkpoint_seconds", "checkpoint", SECOND),
    ]
    return [
        _of_phases(run, "Throughput, tokens a second", "tokens_per_second"),
        _of_phases(run, "Utilisation (MFU)", "mfu"),
        _of_phases(run, "Seconds a step", "seconds"),
        *(_step_chart(run, phase) for phase in run.kinds),
        Chart("Peak memory of a device, bytes", [(device, 0.0)], "memory/peak_bytes"),
        Chart("Peak memory of the process, bytes", [(host, 0.0)], "memory/host_peak_bytes"),
        Chart("Compilation", [(programs, 0.0), (seconds, 0.0)], "compile/count"),
        Chart("Between two steps, seconds", [(between, 0.0)], "time/checkpoint_seconds"),
    ]


def _step_chart(run: Run, phase: str) -> Chart:
    """A chart of where the seconds of a phase's step go."""
    lines = [Line(f"{phase}/{part}_seconds", part, colour) for part, colour in PARTS.items()]
    entry = "rollout_seconds" if f"{phase}/rollout_seconds" in run.curves else "input_seconds"
    return Chart(f"Where a step of {run.label(phase)} goes, seconds", [(lines, 0.0)], entry)


_MANY = ("orange", "blue", "purple", "green", "olive")  # the colours of lines that only their names tell apart


def part_chart(phase: Rewarded, part: str) -> Chart:
    """A part's mean in training and held-out, within the distribution over the responses of a rollout."""
    name = f"reward/{part}"
    middle = Line(phase.trained(f"{name}_p50"), "median", f"{phase.run.colour(phase.phase)} median")
    lines = [Line(phase.trained(name), "training"), Line(phase.held_out(name), "held-out"), middle]
    return Chart(part, [(lines, None)], None, band=(phase.trained(f"{name}_p10"), phase.trained(f"{name}_p90")))


def judge_chart(phase: Rewarded, judge: str) -> Chart:
    """A judge's mean over the held-out answers."""
    return Chart(f"Judge: {judge}", [([Line(phase.held_out(f"judge/{judge}"), "held-out")], None)], "judge")


def combination_charts(phase: Rewarded) -> list[Chart]:
    """Charts of how the parts became one score, as far as the combiner logged it."""

    def line(name: str, label: str, colour: str = "") -> Line:
        return Line(phase.trained(f"reward/{name}"), label, colour)

    def of_each(ending: str) -> list[Line]:
        return [line(f"{part}{ending}", part, many_colour(i)) for i, part in enumerate(phase.parts)]

    def entropy(name: str) -> list[Line]:
        return [line(f"{name}_entropy", "entropy", SECOND)]

    bandit = [(entropy("bandit"), 0.0), ([line("bandit_arm", "part that it tries, from 0", OTHER)], 0.0)]
    shares = [line("gate_open_fraction", "gate open"), line("aspects_fraction", "aspects count", SECOND)]
    slope = [Line(phase.held_out("score_length_slope"), "held-out")]
    return [
        Chart("Weights", [(of_each("_weight"), 0.0)], "_weight"),
        Chart("The gate's shares", [(of_each("_gate"), 0.0), (entropy("gate"), 0.0)], "_gate"),
        Chart("The bandit's chances", [(of_each("_probability"), 0.0), *bandit], "_probability"),
        Chart("Multipliers", [(of_each("_multiplier"), 0.0), (of_each("_excess"), None)], "_multiplier"),
        Chart("Responses let through", [(shares, 0.0)], "reward/gate_open_fraction"),
        Chart("Spread within a rollout", [(of_each("_std"), 0.0)], "_std"),
        Chart("Clipped rows", [(of_each("_clip_fraction"), 0.0)], "_clip_fraction"),
        Chart("Score for a token more", [(slope, None)], "score_length_slope"),
    ]


def many_colour(number: int) -> str:
    """A second round of the same colours is dashed."""
    return _MANY[number % len(_MANY)] + (" dashed" if number >= len(_MANY) else "")
