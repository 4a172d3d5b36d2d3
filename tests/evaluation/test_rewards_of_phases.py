"""Which rewards the evaluation of a run measures."""

import copy
import json

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.experiment import ExperimentConfig, build
from hybrid_jax.testing import TINY, tiny_rows


@pytest.mark.parametrize(
    ("cycle", "prefixes"),
    [({"sft": 1, "late": 1}, ["", "late/"]), ({"ppo": 1}, [""]), ({"sft": 1}, [""])],
)
def test_the_first_reward_is_measured_and_those_of_all_phases_that_take_steps(tmp_path, cycle, prefixes):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    settings = {
        **copy.deepcopy(TINY),
        "run_dir": str(tmp_path / "run"),
        "data": {"name": "jsonl", "train": str(tmp_path / "data.jsonl"), "held_out_fraction": 0.2},
        "scheduler": {"name": "alternation", "cycle": cycle},
        "compilation_cache": None,
    }
    settings["phases"]["late"] = {**TINY["phases"]["ppo"], "name": "ppo"}
    evaluator = build(parse(ExperimentConfig, settings)).evaluator
    assert evaluator is not None
    assert [scores.prefix for scores in evaluator._scored] == prefixes
