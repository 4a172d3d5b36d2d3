"""Searches the mesh and the amount of recomputation that fit and are fastest by prediction.

For each mesh the settings that cost least time are tried first; where a program does not fit, the setting that
makes that program smaller is changed, and the mesh is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid_jax.core.errors import UserError
from hybrid_jax.planning.plan import Plan

Settings = tuple[tuple[str, str], ...]  # dotted names and values, as on the command line
REMAT = "model.execution.remat"
_WEAKER_REMAT = {"none": "dots", "dots": "full", "named": "full"}
_MOST_TENSOR = 8  # with more parts of a layer, its sums no longer stay between neighbouring chips
_MOST_MICROBATCHES = 16


@dataclass(frozen=True)
class Trial:
    """One way to run the experiment, and what came of it."""

    settings: Settings
    plan: Plan | None = None
    problem: str | None = None  # why there is no plan, or why it does not fit

    @property
    def overrides(self) -> str:
        """The settings as overrides to add to the command."""
        return " ".join(f"{name}={value}" for name, value in self.settings)

    @property
    def speed(self) -> float:
        """Predicted tokens a second; 0 for what does not fit."""
        return 0.0 if self.plan is None or self.problem else self.plan.tokens_per_second() or 0.0


def search(
    devices: int,
    current: Mapping[str, str],
    attempt: Callable[[Settings], Plan],
    limit: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Tries at most ``limit`` ways, best first; those that do not fit come last.

    Args:
        devices: number of devices, all of which a mesh must use.
        current: values of the settings that may be changed, beside the mesh: `REMAT`,
            ``phases.<name>.microbatches`` and ``phases.<name>.rollout_weights``, where the config has them.
        attempt: makes a plan; it may stop at the first program that does not fit. A `UserError` that it raises
            is kept as the problem of the trial.
        limit: the most plans that are made.
    """
    trials: list[Trial] = []
    ladders = [_Ladder(mesh, dict(current)) for mesh in meshes(devices)]
    while ladders and len(trials) < limit:
        ladder = ladders.pop(0)
        settings = ladder.settings
        progress(f"trying {' '.join(f'{name}={value}' for name, value in settings)}")
        trial = _try(settings, attempt)
        trials.append(trial)
        progress(f"  {trial.problem or f'{trial.speed:,.0f} tokens/s at best'}")
        if trial.plan is not None and trial.problem and ladder.relieve(trial.plan):
            ladders.insert(0, ladder)  # the same mesh with smaller programs comes before the next mesh
    return sorted(trials, key=lambda trial: -trial.speed)


def _try(settings: Settings, attempt: Callable[[Settings], Plan]) -> Trial:
    try:
        plan = attempt(settings)
    except UserError as error:
        return Trial(settings, problem=str(error))
    if plan.fits is not False:
        return Trial(settings, plan)
    step, chip = plan.fullest, plan.topology.accelerator
    assert chip is not None
    needs = "more" if step.peak is None else f"{step.peak / 2**30:.2f} GiB"
    problem = f"{step.name} needs {needs} of {chip.memory_bytes / 2**30:.2f} GiB"
    return Trial(settings, plan, problem)


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every data × fsdp × tensor of so many devices, those that are most often right first.

    Those are all fsdp, which keeps the least, and all data, which sends the least; then mixtures of two axes.
    """
    shapes = [
        {"data": data, "fsdp": devices // data // tensor, "tensor": tensor}
        for tensor in _divisors(devices)
        if tensor <= _MOST_TENSOR
        for data in _divisors(devices // tensor)
    ]

    def oddness(mesh: dict[str, int]) -> tuple[float, ...]:
        mixed = min(mesh["data"], mesh["fsdp"])
        return math.log2(mesh["tensor"]) + math.log2(mixed), mesh["tensor"], mesh["data"]

    return iter(sorted(shapes, key=oddness))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class _Ladder:
    """One mesh, whose settings make programs smaller step by step."""

    def __init__(self, mesh: Mapping[str, int], current: dict[str, str]):
        self._mesh, self._current = mesh, current
        if REMAT in current:
            current[REMAT] = "none"
        for name in current:
            if name.endswith(".microbatches"):
                current[name] = "1"

    @property
    def settings(self) -> Settings:
        mesh = {f"mesh.{axis}": str(count) for axis, count in self._mesh.items()}
        return tuple({**mesh, **self._current}.items())

    def relieve(self, plan: Plan) -> bool:
        """Changes what makes the programs that do not fit smaller; False where nothing is left to change."""
        failing = [step.name for step in plan.steps if step.fits(plan.topology.accelerator) is False]
        return any([self._relieve(*name.rpartition("/")[::2]) for name in failing])

    def _relieve(self, phase: str, function: str) -> bool:
        weights = f"phases.{phase}.rollout_weights"
        if function == "sample":
            return self._change(weights, "fsdp")
        if function == "score":
            return False
        if (weaker := _WEAKER_REMAT.get(self._current.get(REMAT, ""))) is not None:
            return self._change(REMAT, weaker)
        parts = f"phases.{phase}.microbatches"
        more = 2 * int(self._current.get(parts, _MOST_MICROBATCHES))
        return more <= _MOST_MICROBATCHES and self._change(parts, str(more))

    def _change(self, name: str, value: str) -> bool:
        if self._current.get(name, value) == value:
            return False
        self._current[name] = value
        return True


def render_search(trials: Sequence[Trial], limit: int) -> str:
    """The trials as text, the best as a line to paste."""
    lines = [f"{len(trials)} of at most {limit} ways tried, best first:"]
    for trial in trials:
        outcome = trial.problem or f"{trial.speed:,.0f} tokens/s at best"
        lines.append(f"  {outcome:<60}  {trial.overrides}")
    best = trials[0] if trials and not trials[0].problem else None
    lines.append(f"best: {best.overrides}" if best else "best: none fits; take more chips or a smaller model")
    return "\n".join(lines)
