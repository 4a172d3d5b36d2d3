"""Writes the banner that a run prints before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import jax

from hybrid_jax.core.config import to_dict
from hybrid_jax.parallel.rules import Placement
from hybrid_jax.training.loggers import phase_label
from hybrid_jax.training.scheduler import planned_steps
from hybrid_jax.training.state import RunState


def banner(
    settings: Any, placement: Placement, state: RunState, rows: Mapping[str, int], resumed_at: int | None
) -> str:
    """Writes a title and a line for each thing that a person wants to check before a long run.

    Args:
        settings: the settings of the experiment.
        placement: the devices, and how arrays are split over them.
        state: the state of the run; shapes are enough.
        rows: the number of rows of the data, by split.
        resumed_at: the step of the newest checkpoint; None for a new run.
    """
    named = to_dict(settings)
    lines = {
        "run_dir": f"{settings.run_dir}, {'new' if resumed_at is None else f'goes on at step {resumed_at:,}'}",
        "devices": _devices(placement),
        "model": _model(named["model"], state),
        "data": f"{named['data']['name']}, {rows['train']:,} rows to learn from, {rows['held_out']:,} held out",
        "phases": _phases(settings, named),
        "steps": _steps(settings),
    }
    width = max(map(len, lines))
    title = f"hybrid_jax {version('hybrid_jax')}, jax {version('jax')}"
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines.items())])


def _devices(placement: Placement) -> str:
    used = list(placement.mesh.devices.flat)
    kind, there = used[0].device_kind, len(jax.devices())
    mesh = " × ".join(f"{axis} {size}" for axis, size in placement.mesh.shape.items() if size > 1)
    unused = f" (of {there})" if there > len(used) else ""
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(used)} × {kind}{unused}{f', mesh {mesh}' if mesh else ''}{processes}"


def _model(model: Mapping[str, Any], state: RunState) -> str:
    """Describes the numbers of parameters: all, trained (adapters only, if any), and heads that phases add."""
    groups = {name: _count(group) for name, group in state.train.params.items()}
    policy, base = groups.pop("model"), _count(state.base)
    trained = "all trained" if not base else f"{_short(policy)} of them trained"
    added = "".join(f" (+ {name} {_short(count)})" for name, count in groups.items())
    path = f" {model['path']}" if "path" in model else ""
    return f"{model['name']}{path}, {_short(policy + base)} parameters, {trained}{added}"


def _phases(settings: Any, named: Mapping[str, Any]) -> str:
    """Names the phases with their planned steps, where no metric decides them."""
    name = named["scheduler"]["name"]
    planned = {
        phase_label(phase, named["phases"][phase]["name"]): steps
        for phase, steps in planned_steps(settings.scheduler, settings.steps).items()
    }
    if None in planned.values():
        metric = getattr(settings.scheduler, "metric", "a metric")
        return f"{', '.join(planned)} by {name}, which waits for {metric}"
    return f"{', '.join(f'{phase} {steps:,} steps' for phase, steps in planned.items())} by {name}"


def _steps(settings: Any) -> str:
    every = settings.evaluation.every
    evaluation = "at each end" if every is None else f"every {every:,}"
    return f"{settings.steps:,}, evaluation {evaluation}, checkpoint every {settings.checkpoint.every:,}"


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _short(count: int) -> str:
    for unit, size in {"B": 10**9, "M": 10**6, "K": 10**3}.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
