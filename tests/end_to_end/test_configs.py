"""Every config that ships is valid; the debug one runs, with what only a whole run shows."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.folders.hf import load_pretrained
from hybrid_jax.training.loop import take_step, train

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    config = load_config(path)
    assert set(config.scheduler.phases) <= set(config.phases)


METHODS = {"reinforce", "reinforce_pp", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gdpo"}
METHODS |= {"pass_at_k", "distillation"}
DEAR = sorted(METHODS - {"rloo"})


@pytest.mark.parametrize("name", ["rloo", *(pytest.param(n, marks=pytest.mark.slow) for n in DEAR)])
def test_every_method_without_a_critic_runs_from_its_config(name, tmp_path):
    overrides = [f"run_dir={tmp_path}/run", "evaluation.num_prompts=0", "evaluation.num_examples=0"]
    experiment = build(load_config(CONFIGS / "debug" / f"{name}.yaml", overrides))
    before = jax.tree.map(np.array, experiment.init().train.params["model"])
    state = train(experiment)
    assert state.step == 5
    assert state.schedule.steps[name] >= 2
    moved = [
        np.abs(a - b).max()
        for a, b in zip(*map(jax.tree.leaves, (before, state.train.params["model"])), strict=True)
    ]
    assert 0 < max(moved) < 0.1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["phase"] == name]
    ratios = [record[f"{name}/first_ratio"] for record in steps]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-4)
    assert all(np.isfinite(record[f"{name}/policy_loss"]) for record in steps)


def test_the_policy_is_exported_at_its_cadence(tmp_path):
    overrides = [f"run_dir={tmp_path}/run", "steps=5", "checkpoint.export_every=2", "evaluation.num_prompts=0"]
    overrides += ["phases.ppo.epochs=1", "scheduler.warmup.sft=4"]  # one step of PPO
    experiment = build(load_config(CONFIGS / "debug" / "hybrid.yaml", overrides))
    state = train(experiment)
    folders = sorted(path.name for path in (tmp_path / "run" / "exports").iterdir())
    assert folders == ["step_2", "step_4", "step_5"]
    model, params = load_pretrained(tmp_path / "run" / "exports" / "step_5")
    tokens = np.arange(12, dtype=np.int32)[None]
    expected = jax.jit(experiment.model.apply)(state.train.params["model"], tokens).logits
    np.testing.assert_array_equal(jax.jit(model.apply)(params, tokens).logits, expected)


@pytest.mark.slow
def test_phases_can_share_one_optimizer_state():
    overrides = ["run_dir=/nonexistent", "share_optimizer_state=true", "scheduler.warmup.sft=1"]
    experiment = build(load_config(CONFIGS / "debug" / "hybrid.yaml", overrides))
    state = experiment.init()
    assert set(state.train.opt_state) == {"shared"}
    phases = []
    for _ in range(3):
        phases.append(experiment.scheduler.choose(state.schedule))
        state = take_step(experiment, experiment.phases[phases[-1]], state)
    assert phases == ["sft", "sft", "ppo"]
    model, value = (
        int(next(x for x in jax.tree.leaves(state.train.opt_state["shared"][group]) if x.ndim == 0))
        for group in ("model", "ppo/value")
    )
    assert (model, value) == (2 + 4, 4)  # two of SFT, 2 epochs × 2 minibatches of PPO


def test_sharing_an_optimizer_state_needs_optimizers_of_one_kind():
    overrides = ["share_optimizer_state=true", "phases.sft.optimizer={name: sgd, learning_rate: 0.1}"]
    with pytest.raises(UserError, match="share_optimizer_state needs phases with the same kind of optimizer"):
        load_config(CONFIGS / "debug" / "hybrid.yaml", overrides)
