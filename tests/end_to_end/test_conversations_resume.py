"""A run that is killed in the middle of a conversation goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_conversation_a_run_ends_with_the_same_bits(tmp_path):
    def overrides(name):
        world = (
            f"phases.ppo.environment={{name: 'tests.end_to_end.deadly:Deadly', flag: {tmp_path}/{name}.flag}}"
        )
        return [f"run_dir={tmp_path}/{name}", "checkpoint.every=1", world, "steps=6"]

    def run(name):
        command = [sys.executable, "-m", "hybrid_jax.train", "--config", "configs/debug/twenty_questions.yaml"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([*command, *overrides(name)], cwd=ROOT, env=environment, capture_output=True)

    def end(name):
        experiment = build(load_config(ROOT / "configs/debug/twenty_questions.yaml", overrides(name)))
        state = Checkpoints(experiment.files.checkpoints, keep=1).newest(experiment.init())
        assert state is not None
        assert state.step == 6
        return jax.tree.leaves(state.train)

    assert run("whole").returncode == 0
    (tmp_path / "cut.flag").touch()
    assert run("cut").returncode == -9
    assert not (tmp_path / "cut.flag").exists()
    assert run("cut").returncode == 0
    for a, b in zip(end("whole"), end("cut"), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
