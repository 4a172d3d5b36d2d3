"""A policy gradient of one file, and several of them in one run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.testing import TINY

HERE = Path(__file__).parent
REWARD = {"parts": {"length": {"reward": {"name": "length", "target": 6}}}}


def test_reinforce_of_one_file_has_no_value_and_a_mean_loss_of_zero(tmp_path, run_extension):
    shutil.copy(HERE / "my_reinforce.py", tmp_path)
    rl = {
        "name": "my_reinforce:Reinforce",
        "prompts_per_step": 4,
        "sampler": {"max_new_tokens": 8},
        "reward": REWARD,
    }
    phases = {"sft": TINY["phases"]["sft"], "rl": rl}
    scheduler = {"name": "alternation", "cycle": {"sft": 1, "rl": 1}}
    run = run_extension(tmp_path, {"phases": phases, "scheduler": scheduler, "steps": 4})
    learned = [record for record in run.records if record["phase"] == "rl"]
    assert len(learned) == 2
    for record in learned:
        assert record["kind"] == "my_reinforce:Reinforce"
        assert abs(record["rl/first_ratio"] - 1) < 1e-5
        # No answer ends here, so that all have 8 tokens: the advantages sum to 0, and at ratio 1 the loss does.
        assert record["rl/response_length"] == 8
        assert abs(record["rl/policy_loss"]) < 1e-5
        assert not {"rl/value_loss", "rl/value", "rl/explained_variance"} & record.keys()
        assert record["rl/grad_norm"] > 0
    experiment = build(load_config("config.yaml"))
    assert set(experiment.begin().train.params) == {"model"}
    assert (run.exported / "config.json").is_file()
    assert "score" in run.numbers
    assert "<h3>length</h3>" in run.page


@pytest.mark.slow
def test_two_phases_of_one_kind_have_rewards_values_and_references_of_their_own(tmp_path, run_extension):
    """One value shares the trunk of the policy, one has its own; both phases train the same policy in turn."""
    shared = {**TINY["phases"]["ppo"], "name": "ppo", "references": {"sft": {}}}
    longer = {"parts": {"many": {"reward": {"name": "length", "target": 30}, "normalise": True}}}
    separate = {**shared, "reward": longer, "value_network": "separate", "references": {"sft": {}, "old": {}}}
    phases = {"sft": TINY["phases"]["sft"], "short": shared, "long": separate}
    scheduler = {"name": "alternation", "cycle": {"sft": 1, "short": 1, "long": 1}}
    run = run_extension(tmp_path, {"phases": phases, "scheduler": scheduler, "steps": 6})
    assert [r["phase"] for r in run.records if r["kind"] == "ppo"] == ["short", "long"] * 2
    state = build(load_config("config.yaml")).begin()
    assert set(state.train.params) == {"model", "short/value", "long/value"}
    assert set(state.train.params["short/value"]) == {"head"}
    assert set(state.train.params["long/value"]) == {"head", "model"}
    assert set(state.references) == {"short/sft", "long/sft", "long/old"}
    heads = [state.train.params[f"{name}/value"]["head"]["kernel"] for name in ("short", "long")]
    assert all(np.abs(head).max() > 0 for head in heads)
    assert not np.array_equal(*heads)
    # The policy moved between the first steps of the two, and with it what each froze.
    frozen = [
        json.dumps(np.asarray(_first(state.references[f"{name}/sft"])).tolist()) for name in ("short", "long")
    ]
    assert frozen[0] != frozen[1]
    assert {"short/reward", "long/reward"} == set(state.host)
    assert state.host["long/reward"]["many"]["count"] == 2 * 4
    assert {"short/kl_control", "long/kl_control"} <= set(state.train.extra)
    # Each held-out answer is scored by both: a = -(6 - n) / 6 of n words, and -(30 - n) / 30 = -0.8 + 0.2 a.
    evaluations = [record for record in run.records if record["phase"] == "evaluation"]
    assert evaluations
    for found in evaluations:
        by_short, by_long = (found["by_prompt"][f"evaluation/{name}"] for name in ("score", "long/score"))
        np.testing.assert_allclose(by_long, -0.8 + 0.2 * np.array(by_short), rtol=1e-5)
        assert found["evaluation/long/score"] == pytest.approx(-0.8 + 0.2 * found["evaluation/score"], rel=1e-5)
        assert found["evaluation/long/reward/many"] == pytest.approx(found["evaluation/long/score"])
    assert "Held-out score of long" in run.page


def _first(tree):
    while isinstance(tree, dict):
        tree = next(iter(tree.values()))
    return tree
