"""One tiny run that the commands read, and the config that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hybrid_jax import train
from hybrid_jax.core.cli import _exit_code
from hybrid_jax.testing import TINY, tiny_rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with config.yaml and data.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    data = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out_fraction": 0.2}
    settings = {
        "run_dir": str(folder / "run"),
        "data": data,
        **TINY,
        "compilation_cache": None,
    }  # that of the tests
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def run_dir(tiny) -> Path:
    """A finished run; tests read it and change nothing."""
    assert _exit_code(train.main, ["--config", str(tiny / "config.yaml")]) == 0
    return tiny / "run"


@pytest.fixture
def command(capsys):
    """Runs the ``main`` of a command as a process would; gives (exit code, stdout, stderr)."""

    def run(main, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = _exit_code(main, [str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
