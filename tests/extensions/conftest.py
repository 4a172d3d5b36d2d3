"""Runs a component that somebody has written in one file outside the package, from training to the report."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from hybrid_jax import FAMILIES, build, evaluate, export, load_config, report, train
from hybrid_jax.core.cli import _exit_code
from hybrid_jax.testing import TINY, tiny_rows

HERE = Path(__file__).parent
Run = Callable[[Path, Mapping[str, Any]], "Extended"]


@dataclass(frozen=True)
class Extended:
    """What a run with an extension has left.

    Attributes:
        folder: the run directory.
        records: of ``metrics.jsonl``.
        samples: of ``samples.jsonl``.
        numbers: what ``hybrid_jax.evaluate`` measures, by name.
        exported: the folder that ``hybrid_jax.export`` wrote.
        page: the HTML of the report.
    """

    folder: Path
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    numbers: dict[str, float]
    exported: Path
    page: str


@pytest.fixture
def run_extension(monkeypatch) -> Iterator[Run]:
    """``run_extension(folder, config)`` trains, resumes, evaluates and exports with the code in a folder.

    The folder is on the path of modules and outside of this checkout; the config is merged over the tiny run of
    `hybrid_jax.testing`, of which it replaces whole settings.
    """
    known, families = set(sys.modules), set(FAMILIES)

    def run(folder: Path, config: Mapping[str, Any]) -> Extended:
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
        data = {"name": "jsonl", "train": "data.jsonl", "held_out_fraction": 0.2}
        settings = {"run_dir": "run", "data": data, **TINY, "compilation_cache": None, **config}
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        command(train.main, "--config", file)
        check_it_resumes(file)
        command(evaluate.main, "--run", "run", "--config", file, "--json", "numbers.json")
        command(export.main, "--run", "run", "--config", file, "--output", "exported")
        command(report.main, "--run", "run")
        lines = {name: (folder / "run" / name).read_text().splitlines() for name in LOGS}
        records, samples = ([json.loads(line) for line in lines[name]] for name in LOGS)
        numbers = json.loads((folder / "numbers.json").read_text())["numbers"]
        page = (folder / "run" / "report.html").read_text()
        return Extended(folder / "run", records, samples, numbers, folder / "exported", page)

    yield run
    for name in set(sys.modules) - known:  # another test may have a file of the same name
        if Path(getattr(sys.modules[name], "__file__", None) or HERE).parent == Path.cwd():
            del sys.modules[name]
    for name in set(FAMILIES) - families:
        del FAMILIES[name]


LOGS = ("metrics.jsonl", "samples.jsonl")


def command(main: Callable[[list[str]], None], *arguments: object) -> None:
    assert _exit_code(main, [str(argument) for argument in arguments]) == 0


def check_it_resumes(config: Path) -> None:
    """A copy of the run that has lost its newest checkpoint ends with the same bits once more."""
    shutil.copytree("run", "again")
    steps = sorted(int(path.name) for path in Path("again/checkpoints").iterdir() if path.name.isdigit())
    assert len(steps) > 1, steps
    shutil.rmtree(Path("again/checkpoints") / str(steps[-1]))
    command(train.main, "--config", config, "run_dir=again")
    whole, resumed = (final_arrays(config, run) for run in ("run", "again"))
    assert len(whole) == len(resumed) > 0
    assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, resumed, strict=True))


def final_arrays(config: Path, run: str) -> list[np.ndarray]:
    experiment = build(load_config(config, [f"run_dir={run}"]))
    state = experiment.begin()
    assert state.step == experiment.steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.train, state.references))]
