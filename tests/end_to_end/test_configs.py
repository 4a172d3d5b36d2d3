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


ONLINE = {"online_dpo": 1 / 4, "online_opponent": 0.0, "spin": None, "sppo_online": 1 / 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_preferences_online_run_from_their_config_and_a_resumed_run_ends_alike(name, tmp_path):
    def end(folder, *stops):
        for stop in stops:
            overrides = [f"run_dir={tmp_path}/{folder}", f"steps={stop}", "evaluation.num_prompts=0"]
            state = train(build(load_config(CONFIGS / "debug" / f"{name}.yaml", overrides)))
        return jax.tree.leaves((state.train, state.references))

    whole, cut = end("whole", 6), end("cut", 3, 6)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(whole, cut, strict=True))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["phase"] == "online_preference"]
    numbers = {key.removeprefix("online_preference/"): value for key, value in steps[0].items()}
    assert len(steps) == 4
    # The policy is its own reference, until the first update.
    assert numbers["kl"] == pytest.approx(0.0, abs=1e-4)
    assert numbers.get("ties") == ONLINE[name]
    for metric in ("chosen_log_prob", "rejected_log_prob", "margin", "accuracy", "score"):
        assert np.isfinite([step[f"online_preference/{metric}"] for step in steps]).all()
    moved = [step["online_preference/kl"] for step in steps[1:]]
    assert 0 < max(map(abs, moved)) < 5


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "debug").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_debug_config_runs_to_its_end(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    experiment = build(load_config(path, [f"run_dir={tmp_path}/run"]))
    assert train(experiment).step == experiment.steps
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [n for record in records for name, n in record.items() if name.endswith("loss")]
    assert losses
    assert np.isfinite(losses).all()


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
