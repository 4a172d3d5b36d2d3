"""Trains the 27-sequence model and the bandit from a config, and gives the probabilities that they learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hybrid_jax import Experiment, build, load_config
from hybrid_jax.testing import sequence_probabilities
from hybrid_jax.training.state import RunState

REWARD = {"name": "token_count", "weights": {2: 1.0}, "first_token_weights": {1: -0.5}}
BETA = 0.5
ON_POLICY: dict[str, Any] = {
    "sampler": {"max_new_tokens": 3},
    "missing_eos_penalty": None,
    "kl_control": {"coef": BETA},
    "reward": {"parts": {"count": {"reward": REWARD}}},
    "optimizer": {"name": "adam", "learning_rate": 0.05, "schedule": "linear", "max_grad_norm": None},
}
Trained, Learned = Callable[..., RunState], Callable[..., np.ndarray]


@pytest.fixture
def on_policy() -> dict[str, Any]:
    """Settings of every method that samples: the reward, its strength, and three tokens a response."""
    return ON_POLICY


@pytest.fixture
def built(tmp_path, monkeypatch) -> Callable[..., Experiment]:
    """``built(phases, steps)`` makes the experiment of a config."""
    monkeypatch.syspath_prepend(Path(__file__).parent)

    def make(phases: Mapping[str, Any], steps: int, prompt: str = "0", **settings: Any) -> Experiment:
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        config = {
            "run_dir": str(tmp_path / "run"),
            "steps": steps,
            "model": "worlds:Enumerated",
            "tokenizer": "worlds:Digits",
            "data": {
                "name": "jsonl",
                "train": str(tmp_path / "prompts.jsonl"),
                "held_out": str(tmp_path / "prompts.jsonl"),
                "response_field": None,
            },
            "phases": phases,
            "scheduler": {"name": "alternation", "cycle": dict.fromkeys(phases, 1)},
            "evaluation": {"num_prompts": 0, "num_examples": 0, "num_shown": 0},
            "checkpoint": {"every": 10_000},
            **settings,
        }
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        return build(load_config(file))

    return make


@pytest.fixture
def trained(built) -> Trained:
    """``trained(phases, steps)`` trains by a config and returns the state at the end."""
    return lambda *arguments, **settings: built(*arguments, **settings).train()


@pytest.fixture
def learned(trained) -> Learned:
    """``learned(phases, steps)`` trains by a config and returns π(s) of the 27 responses."""
    return lambda *arguments, **settings: sequence_probabilities(trained(*arguments, **settings).policy)
