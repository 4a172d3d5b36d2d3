"""DPO as one file outside the package: a supervised loss with a reference, from training to the report."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax import build, load_config

HERE = Path(__file__).parent
ROWS = [{"prompt": f"say {i}:", "chosen": f" {i} it is", "rejected": " no!"} for i in range(16)]
CONFIG = {
    "steps": 8,
    "data": {
        "name": "preferences",
        "source": {"name": "jsonl", "train": "pairs.jsonl", "held_out_fraction": 0.25},
    },
    "phases": {
        "sft": {"batch_size": 4, "length": 32},
        "preferences": {
            "name": "my_dpo:DPO",
            "batch_size": 4,
            "microbatches": 2,
            "length": 32,
            "beta": 0.5,
            "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        },
    },
    "scheduler": {"name": "alternation", "warmup": {"sft": 2}, "cycle": {"preferences": 1}},
}


@pytest.mark.slow
def test_a_supervised_loss_of_one_file_learns_from_pairs(tmp_path, run_extension):
    shutil.copy(HERE / "my_dpo.py", tmp_path)
    assert len((tmp_path / "my_dpo.py").read_text().splitlines()) <= 60
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = run_extension(tmp_path, CONFIG)  # trains, resumes to the same bits, evaluates, exports, reports
    steps = [record for record in run.records if record["phase"] == "preferences"]
    assert [record["kind"] for record in steps] == ["my_dpo:DPO"] * 6
    # The first step compares the policy with its own copy.
    assert steps[0]["preferences/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert steps[0]["preferences/margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["preferences/accuracy"] == 1.0
    assert steps[-1]["preferences/loss"] < 0.5
    assert "preferences/margin" in run.page
    assert (run.exported / "model.safetensors").is_file()


@pytest.mark.slow
def test_its_loss_is_that_of_the_paper(tmp_path, run_extension, monkeypatch):
    shutil.copy(HERE / "my_dpo.py", tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run_extension(tmp_path, {**CONFIG, "steps": 4})
    experiment = build(load_config("config.yaml"))
    state = experiment.begin()
    phase = experiment.phases["preferences"]
    batch, _ = phase.batch(state, 0)
    reference = next(iter(state.references.values()))
    params = {"model": state.policy, "references/sft": reference}
    found, _ = phase.objective.loss(params, batch, None)

    def log_prob(params, i, k):
        logits = np.asarray(experiment.model.apply(params, batch.tokens[i, k][None]).logits[0], np.float64)
        total = 0.0
        for t in range(1, batch.tokens.shape[2]):
            if batch.loss_mask[i, k, t]:
                row = logits[t - 1]
                total += row[batch.tokens[i, k, t]] - math.log(np.exp(row - row.max()).sum()) - row.max()
        return total

    expected = 0.0
    for i in range(4):
        gain = [log_prob(state.policy, i, k) - log_prob(reference, i, k) for k in (0, 1)]
        expected += math.log(1 + math.exp(-0.5 * (gain[0] - gain[1])))
    assert float(found["loss"].total) == pytest.approx(expected, rel=1e-4)
