"""A head of one file, on the trunk of a run that is fine-tuned and rewarded, too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.core.errors import Untrusted
from hybrid_jax.models.folders.scorer import load_scorer
from hybrid_jax.testing import TINY

NAME = "my_head:Nearest"
ROWS = [{"text": f"{word} {i}", "label": word} for i in range(12) for word in ("good", "bad")]


@pytest.mark.slow
def test_a_head_of_one_file_trains_on_a_running_trunk(tmp_path, run_extension):
    shutil.copy(Path(__file__).parent / "my_head.py", tmp_path)
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = {"name": "labelled", "train": "labelled.jsonl", "held_out_fraction": 0.25}
    config = {
        "steps": 8,
        "heads": {"mood": {"name": NAME, "labels": ["bad", "good"]}},
        "phases": {
            **TINY["phases"],
            "classifier": {
                "head": "mood",
                "batch_size": 6,
                "length": 16,
                "calibration_fraction": 0,
                "source": source,
            },
        },
        "scheduler": {"name": "alternation", "warmup": {"sft": 1, "ppo": 1}, "cycle": {"classifier": 1}},
    }
    run = run_extension(tmp_path, config)
    steps = [record for record in run.records if record["phase"] == "classifier"]
    assert len(steps) == 6
    assert steps[-1]["classifier/loss"] < steps[0]["classifier/loss"]
    assert run.numbers["classifier/accuracy"] == pytest.approx(
        run.records[-1]["evaluation/classifier/accuracy"]
    )
    assert "classifier/accuracy" in run.page

    folder = run.exported / "heads" / "mood"
    with pytest.raises(Untrusted, match=f"head '{NAME}' runs code of its own"):
        load_scorer(folder)
    scorer, params = load_scorer(folder, trust={NAME})
    experiment = build(load_config("config.yaml"))
    state, phase = experiment.begin(), experiment.phases["classifier"]
    tokens, mask = np.full((2, 8), 100, np.int32), np.ones((2, 8), bool)
    expected = phase.scorer.apply(phase.params_of(state), tokens, mask)
    np.testing.assert_allclose(scorer.apply(params, tokens, mask), expected, atol=1e-6)
