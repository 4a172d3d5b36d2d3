"""Whole runs in float16 and with rounded moments: they resume as they were; a run that meets NaN says where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.loggers import read_records
from hybrid_jax.training.loop import train
from hybrid_jax.training.nonfinite import NonFiniteError

QUIET = ["evaluation={num_prompts: 0, num_examples: 0}", "checkpoint.every=100"]
CONSTANT = [f"phases.{phase}.optimizer.schedule={{name: constant}}" for phase in ("sft", "ppo")]
SFT_ALONE = "scheduler.cycle={sft: 1, ppo: 0}"


def experiment(tiny, folder, *overrides):
    return build(load_config(tiny / "config.yaml", [f"run_dir={folder}", *QUIET, *overrides]))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """A run in float16, traced, and its final state."""
    folder = tmp_path_factory.mktemp("half")
    watched = ["peak_tflops=1.0", "profile={start: 1, steps: 1}"]
    return folder, train(experiment(tiny, folder, "steps=4", "model.dtype=float16", *CONSTANT, *watched))


def records_of(folder, phase):
    return [record for record in read_records(folder / "metrics.jsonl") if record["phase"] == phase]


@pytest.mark.slow
def test_a_float16_run_keeps_its_loss_scale_over_a_restart(tiny, half, tmp_path):
    _, unbroken = half
    settings = ["model.dtype=float16", *CONSTANT]
    train(experiment(tiny, tmp_path, "steps=2", *settings))
    resumed = train(experiment(tiny, tmp_path, "steps=4", *settings))
    scale = resumed.train.extra["loss_scale"]
    assert (float(scale.scale), int(scale.good_steps)) == (2.0**15, 4)  # one update a step, SFT or PPO
    assert bits(resumed.train) == bits(unbroken.train)
    for phase in ("sft", "ppo"):
        assert [record[f"{phase}/loss_scale"] for record in records_of(tmp_path, phase)] == [2.0**15] * 2


@pytest.mark.slow
def test_a_run_traces_the_step_that_it_is_asked_for_and_says_where_its_time_went(half):
    folder, _ = half
    assert list((folder / "profile").rglob("*.xplane.pb"))
    for step in records_of(folder, "ppo"):
        parts = ("input", "rollout", "reward", "score", "update")
        split = sum(step[f"ppo/{part}_seconds"] for part in parts)
        assert split == pytest.approx(step["ppo/seconds"], rel=1e-6)
        assert 0 < step["ppo/mfu"] < 1
        assert step["memory/host_peak_bytes"] > 2**26
        assert step["compile/count"] >= 3
    for step in records_of(folder, "sft"):
        # The input of a step is read while the device is still busy with the one before.
        left = max(step["sft/seconds"] - step["sft/input_seconds"], 0.0)
        assert step["sft/update_seconds"] == pytest.approx(left, abs=1e-6)


@pytest.mark.slow
def test_a_run_with_rounded_moments_goes_on_to_the_same_bits(tiny, tmp_path):
    settings = [*CONSTANT, SFT_ALONE, "phases.sft.optimizer.state_dtype=bfloat16"]
    unbroken = train(experiment(tiny, tmp_path / "unbroken", "steps=3", *settings))
    train(experiment(tiny, tmp_path / "run", "steps=2", *settings))
    resumed = train(experiment(tiny, tmp_path / "run", "steps=3", *settings))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(resumed.train.opt_state) if leaf.ndim} == {"bfloat16"}
    assert bits(resumed.train) == bits(unbroken.train)


def test_phases_that_share_a_state_keep_it_in_one_dtype(tiny):
    overrides = ["share_optimizer_state=true", "phases.ppo.optimizer.state_dtype=bfloat16"]
    with pytest.raises(UserError, match="same kind of optimizer and the same state_dtype"):
        load_config(tiny / "config.yaml", overrides)


def test_a_run_from_damaged_weights_names_them(tiny, tmp_path):
    run = experiment(tiny, tmp_path / "run", SFT_ALONE)
    with run.owned():
        state, checkpoints, recorder = run.open()
    kernel = state.train.params["model"]["layer_0"]["attention"]["query"]
    kernel["kernel"] = kernel["kernel"].at[3, 5].set(jnp.nan)
    object.__setattr__(run, "open", lambda: (state, checkpoints, recorder))
    message = r"step 0 \(sft\): the parameter layer_0/attention/query/kernel is not finite"
    with pytest.raises(NonFiniteError, match=message):
        train(run)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_learning_rate_that_breaks_a_run_names_the_step_and_the_loss(tiny, tmp_path):
    settings = [SFT_ALONE, "phases.sft.optimizer.learning_rate=1e9", "checkpoint.every=1"]
    message = r"step 1 \(sft\): the gradient of \S+ is not finite; the update was left out"
    with pytest.raises(NonFiniteError, match=message):
        train(experiment(tiny, tmp_path / "run", *CONSTANT[:1], *settings))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]  # before the bad step
