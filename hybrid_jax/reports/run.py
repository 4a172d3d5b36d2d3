"""Reads the run that a report is about from its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import read_text
from hybrid_jax.core.json_text import MOST_BYTES
from hybrid_jax.core.secrets import without_secrets
from hybrid_jax.reports.charts import HELD_OUT, OTHER, Block, phase_blocks, phase_colour
from hybrid_jax.runs.files import RunFiles
from hybrid_jax.training.loggers import (
    BY_PROMPT,
    METRICS_FILE,
    SAMPLES_FILE,
    phase_label,
    read_records,
    without_extremes,
)
from hybrid_jax.training.time_left import EVALUATION


@dataclass(frozen=True)
class Run:
    """The content of a run directory.

    Attributes:
        name: of the directory.
        records: the records of ``metrics.jsonl``.
        samples: answers to the same prompts at each evaluation.
        extremes: answers that were picked since a part likes them best or least.
        config: the settings, without secrets.
        environment: the content of ``environment.json``.
        conversations: with the same held-out environments at each evaluation.
        memories: where the heads of a memory were at each evaluation.
    """

    name: str
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    extremes: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    conversations: list[dict[str, Any]] = field(default_factory=list)
    memories: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float | None]]]:
        """Steps and values of every metric, a value that is no finite number as a gap."""
        curves: dict[str, tuple[list[int], list[float | None]]] = {}
        for record in self.records:
            for name, value in record.items():
                if "/" in name and (value is None or isinstance(value, int | float)):
                    xs, ys = curves.setdefault(name, ([], []))
                    xs.append(record["step"])
                    ys.append(float(value) if value is not None and math.isfinite(value) else None)
        return {name: curve for name, curve in curves.items() if any(y is not None for y in curve[1])}

    @cached_property
    def training(self) -> list[tuple[int, str]]:
        """(step, phase) of every record of a step."""
        return [(r["step"], r["phase"]) for r in self.records if r["phase"] != EVALUATION]

    @cached_property
    def num_steps(self) -> int:
        """The number of steps, up to the last one that was logged."""
        return max((step + 1 for step, _ in self.training), default=0)

    @cached_property
    def end(self) -> int:
        """The end of the axis of steps."""
        return max(self.num_steps, *(record["step"] for record in self.records), 1)

    @cached_property
    def blocks(self) -> list[Block]:
        """The steps of the run in blocks, each phase by its colour."""
        steps = [(step, self.colour(phase)) for step, phase in self.training]
        return phase_blocks(steps, max(self.num_steps, 1))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The kind of each phase that took a step, in the order in which they first did.

        Records of older versions hold none: then the config says it, as ``phases.<phase>.name``, and if that is
        left out, the phase has the name of its kind.
        """
        kinds: dict[str, str] = {}
        for record in self.records:
            if (phase := record["phase"]) != EVALUATION and phase not in kinds:
                kinds[phase] = str(record.get("kind") or self.settings.get(phase, {}).get("name") or phase)
        return kinds

    @cached_property
    def settings(self) -> dict[str, Mapping[str, Any]]:
        """The settings of each phase, as far as the config of the run tells them."""
        phases = self.config.get("phases")
        found = phases.items() if isinstance(phases, Mapping) else ()
        return {phase: of_phase for phase, of_phase in found if isinstance(of_phase, Mapping)}

    def named(self, metric: str) -> tuple[str, str]:
        """The phase and the name of a metric; the phase of a held-out one is that which measures it, or none.

        A phase logs ``<phase>/<name>``, the evaluation ``evaluation/<name>``, and what a phase measures there
        ``evaluation/<phase>/<name>``, unless the run has nothing else to evaluate.
        """
        phase, _, name = metric.partition("/")
        if phase != EVALUATION:
            return phase, name
        of, _, own = name.partition("/")
        return (of, own) if own and of in self.kinds else ("", name)

    def label(self, phase: str) -> str:
        """The name of a phase on the page, with its kind where that is another word."""
        return phase_label(phase, self.kinds.get(phase))

    def colour(self, metric: str) -> str:
        """The colour of a curve, that of its phase."""
        phase = metric.partition("/")[0]
        if phase == EVALUATION:
            return HELD_OUT
        return phase_colour(list(self.kinds).index(phase)) if phase in self.kinds else OTHER

    @cached_property
    def rewarded(self) -> list[str]:
        """The phases that learn from a reward: those that log a score, or parts of one."""
        return [
            phase for phase in self.kinds if f"{phase}/score" in self.curves or self.names(f"{phase}/reward/")
        ]

    @cached_property
    def first_reward_step(self) -> int | None:
        """The first step that learned from a reward; None if none did."""
        return next((step for step, phase in self.training if phase in self.rewarded), None)

    @cached_property
    def before_reward(self) -> str:
        """The names of the phases that took steps before the first one with a reward; "" where none did."""
        until = self.first_reward_step or 0
        return " and ".join(dict.fromkeys(phase for step, phase in self.training if step < until))

    def names(self, prefix: str) -> list[str]:
        """Lists what follows a prefix in the names of metrics."""
        return [metric.removeprefix(prefix) for metric in self.curves if metric.startswith(prefix)]

    def points(self, metric: str, since: int = 0) -> list[tuple[int, float]]:
        """The (step, value) of a metric from the step ``since`` on, without gaps."""
        xs, ys = self.curves.get(metric, ([], []))
        return [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and x >= since]

    def by_prompt(self, metric: str, step: int) -> list[float]:
        """The value of each held-out prompt at the evaluation of a step; none where the run stored none."""
        for record in self.records:
            values = record.get(BY_PROMPT)
            if record["step"] == step and record["phase"] == EVALUATION and isinstance(values, dict):
                found = values.get(metric)
                if isinstance(found, list) and all(isinstance(value, int | float) for value in found):
                    return found
        return []

    def value(self, metric: str, until: int | None = None) -> tuple[int, float] | None:
        """The last (step, value) of a metric, or the last one up to the step ``until``."""
        known = [(x, y) for x, y in self.points(metric) if until is None or x <= until]
        return known[-1] if known else None


def _read_environment(path: Path) -> dict[str, Any]:
    """Reads the environment less strictly than a config, since it is only shown."""
    text = read_text(path, MOST_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_run(files: RunFiles) -> Run:
    """Reads the run in a directory.

    Raises:
        UserError: there is no such directory, it holds no metrics yet, or a file of it is damaged.
    """
    if not (run_dir := files.folder).is_dir():
        raise UserError(f"no run directory {files.name!r}")
    records = [r for r in read_records(run_dir / METRICS_FILE) if isinstance(r.get("phase"), str)]
    if not records:
        raise UserError(f"{files.name}/{METRICS_FILE} holds no metrics yet; train first, or name another run")
    written = list(read_records(run_dir / SAMPLES_FILE))
    conversations = [
        r for r in written if isinstance(r.get("conversation"), list) and {"index", "of"} <= r.keys()
    ]
    memories = [r for r in written if isinstance(r.get("memory"), dict)]
    samples = [r for r in written if {"index", "prompt", "response"} <= r.keys()]
    config_file, environment_file = run_dir / "config.yaml", run_dir / "environment.json"
    config = without_secrets(load_yaml(config_file)) if config_file.is_file() else {}
    environment = _read_environment(environment_file) if environment_file.exists() else {}
    shown = without_extremes(samples)
    extremes = [record for record in samples if "extreme" in record]
    told = (conversations, memories)
    return Run(run_dir.resolve().name, records, shown, extremes, config, environment, *told)
