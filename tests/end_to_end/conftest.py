"""One tiny run that the commands read, and the config that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hybrid_jax import train
from hybrid_jax.core.cli import _exit_code

TINY = {
    "steps": 3,
    "model": {"name": "decoder", "num_layers": 1, "width": 16, "num_heads": 2, "max_length": 48},
    "tokenizer": "bytes",
    "phases": {
        "sft": {"batch_size": 4, "length": 32},
        "ppo": {
            "prompts_per_step": 4,
            "epochs": 1,
            "sampler": {"max_new_tokens": 8},
            "reward": {"parts": {"length": {"reward": {"name": "length", "target": 6}}}},
        },
    },
    "scheduler": {"name": "alternation", "cycle": {"sft": 1, "ppo": 1}},
    "evaluation": {"num_prompts": 4, "num_examples": 8, "batch_size": 4, "length": 32},
    "checkpoint": {"every": 2},
    "compilation_cache": None,  # that of the tests
}


def rows(count: int = 40) -> list[dict]:
    return [{"prompt": f"say {i}:", "completion": f"{i} it is", "number": i} for i in range(count)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with config.yaml and data.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    data = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out_fraction": 0.2}
    settings = {"run_dir": str(folder / "run"), "data": data, **TINY}
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
