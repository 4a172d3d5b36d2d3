"""The run that a report is about, as its files tell it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import read_text
from hybrid_jax.core.json_text import MOST_BYTES
from hybrid_jax.core.secrets import without_secrets
from hybrid_jax.reports.charts import Block, phase_blocks
from hybrid_jax.runs.files import RunFiles
from hybrid_jax.training.loggers import (
    BY_PROMPT,
    METRICS_FILE,
    SAMPLES_FILE,
    read_records,
    without_extremes,
)


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        name: of the directory.
        records: of ``metrics.jsonl``.
        samples: answers to the same prompts each time.
        extremes: answers that were picked as those that a part likes best or least.
        config: without secrets.
        environment: of ``environment.json``.
    """

    name: str
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    extremes: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

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
        return [(r["step"], r["phase"]) for r in self.records if r["phase"] != "evaluation"]

    @cached_property
    def num_steps(self) -> int:
        return max((step + 1 for step, _ in self.training), default=0)

    @cached_property
    def end(self) -> int:
        """Where the axis of steps ends."""
        return max(self.num_steps, *(record["step"] for record in self.records), 1)

    @cached_property
    def blocks(self) -> list[Block]:
        return phase_blocks(self.training, max(self.num_steps, 1))

    @cached_property
    def first_ppo_step(self) -> int | None:
        return next((step for step, phase in self.training if phase == "ppo"), None)

    @cached_property
    def parts(self) -> list[str]:
        """Names of the parts of the reward; beside each stand numbers of its distribution, in newer runs."""
        held_out = self._names("evaluation/reward/")
        trained = [name for name in self._names("ppo/reward/") if "~" not in name]
        if described := [name for name in trained if f"ppo/reward/{name}_std" in self.curves]:
            trained = described
        return list(dict.fromkeys([*held_out, *trained]))

    @cached_property
    def judges(self) -> list[str]:
        return self._names("evaluation/judge/")

    def _names(self, prefix: str) -> list[str]:
        return [metric.removeprefix(prefix) for metric in self.curves if metric.startswith(prefix)]

    def points(self, metric: str, since: int = 0) -> list[tuple[int, float]]:
        """The (step, value) of a metric from the step ``since`` on, without gaps."""
        xs, ys = self.curves.get(metric, ([], []))
        return [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and x >= since]

    def by_prompt(self, metric: str, step: int) -> list[float]:
        """The value of each held-out prompt at the evaluation of a step; none where the run stored none."""
        for record in self.records:
            values = record.get(BY_PROMPT)
            if record["step"] == step and record["phase"] == "evaluation" and isinstance(values, dict):
                found = values.get(metric)
                if isinstance(found, list) and all(isinstance(value, int | float) for value in found):
                    return found
        return []

    @cached_property
    def silent_parts(self) -> dict[str, float]:
        """Parts that gave the same to all responses of each rollout of the run, with what they gave on average.

        The same is a standard deviation of at most a billionth of the mean.
        """
        found = {}
        for part in self.parts:
            spreads = self.points(f"ppo/reward/{part}_std")
            means = dict(self.points(f"ppo/reward/{part}"))
            if spreads and all(std <= 1e-9 * max(1.0, abs(means.get(step, 0.0))) for step, std in spreads):
                found[part] = fmean(means.values()) if means else 0.0
        return found

    @cached_property
    def has_signal(self) -> bool:
        """Whether the reward ever told two responses of a rollout apart; true where that was not logged."""
        if any(f"ppo/reward/{part}_std" in self.curves for part in self.parts):
            return len(self.silent_parts) < len(self.parts)
        spreads = self.points("ppo/score_std")
        return not spreads or any(spread > 0 for _, spread in spreads)

    def late_mean(self, metric: str) -> float | None:
        """The mean of a metric of PPO over the last tenth of its steps."""
        steps = [step for step, phase in self.training if phase == "ppo"]
        late = self.points(metric, since=steps[-math.ceil(len(steps) / 10)]) if steps else []
        return fmean(y for _, y in late) if late else None

    def late_correlation(self, a: str, b: str) -> float | None:
        """Of two parts, "score" or "response_length", over the responses of a rollout: `late_mean` of it."""
        forth, back = (self.late_mean(f"ppo/reward/{x}~{y}") for x, y in ((a, b), (b, a)))
        return back if forth is None else forth

    def value(self, metric: str, until: int | None = None) -> tuple[int, float] | None:
        """The last (step, value) of a metric, or the last one up to the step ``until``."""
        known = [(x, y) for x, y in self.points(metric) if until is None or x <= until]
        return known[-1] if known else None


def _read_environment(path: Path) -> dict[str, Any]:
    """Shown as it is: less strict than a config must be read."""
    text = read_text(path, MOST_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def read_run(files: RunFiles) -> Run:
    """The run in a directory.

    Raises:
        UserError: there is no such directory, it holds no metrics yet, or a file that is none of ours.
    """
    if not (run_dir := files.folder).is_dir():
        raise UserError(f"no run directory {files.name!r}")
    records = [r for r in read_records(run_dir / METRICS_FILE) if isinstance(r.get("phase"), str)]
    if not records:
        raise UserError(f"{files.name}/{METRICS_FILE} holds no metrics yet; train first, or name another run")
    samples = [r for r in read_records(run_dir / SAMPLES_FILE) if {"index", "prompt", "response"} <= r.keys()]
    config_file, environment_file = run_dir / "config.yaml", run_dir / "environment.json"
    config = without_secrets(load_yaml(config_file)) if config_file.is_file() else {}
    environment = _read_environment(environment_file) if environment_file.exists() else {}
    shown = without_extremes(samples)
    extremes = [record for record in samples if "extreme" in record]
    return Run(run_dir.resolve().name, records, shown, extremes, config, environment)
