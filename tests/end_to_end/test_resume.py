"""Real processes: killed, stopped, and out of disk space."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug" / "resume.yaml"


CACHE = ROOT / ".pytest_cache" / "jax"  # of compiled programs


@pytest.fixture
def environment():
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    return {**os.environ, "XLA_FLAGS": flags}  # one device, as a user has on a CPU


def command(run_dir, *overrides):
    settings = [f"run_dir={run_dir}", f"compilation_cache={CACHE}", *overrides]
    return [sys.executable, "-m", "hybrid_jax.train", "--config", str(CONFIG), *settings]


def reproduce(environment, *options):
    script = [sys.executable, str(ROOT / "scripts" / "reproduce_resume.py"), *options]
    return subprocess.run(script, env=environment, capture_output=True, text=True)


def test_a_run_that_is_killed_within_an_update_ends_with_the_bits_of_an_unbroken_one(environment):
    result = reproduce(environment, "--kills", "1", "--steps", "5", "--cache", str(CACHE))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PPO, between minibatches" in result.stdout
    assert result.stdout.endswith("no difference: every array, number and sample is the same, bit for bit\n")


@pytest.mark.slow
def test_a_run_that_is_stopped_at_twelve_places_ends_with_the_bits_of_an_unbroken_one(environment):
    result = reproduce(environment, "--kills", "12", "--seed", str(time.time_ns()))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_process_that_is_told_to_stop_while_it_compiles_its_first_step_ends_with_143(environment, tmp_path):
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    process = subprocess.Popen(command(run_dir), env=environment, stderr=subprocess.PIPE, text=True)
    while not (metrics.exists() and metrics.stat().st_size):  # the first evaluation, just before the first step
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert max(steps) <= 1  # the step that was under way, and no more
    said = stderr.splitlines()
    assert "SIGTERM: saving after this step …" in said
    assert said[-1] == f"stopped at step {max(steps) + 1}: saved; the same command goes on"
    assert not (run_dir / "lock.json").exists()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_keeps_its_checkpoints(environment, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    try:
        result = subprocess.run(
            command(disk / "run", "checkpoint.every=1", "checkpoint.keep=4", "evaluation.num_examples=0"),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "no space left on the disk; earlier checkpoints are kept" in errors[0]
        assert newest_step(disk / "run") >= 1
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def newest_step(run_dir):
    from hybrid_jax.experiment import build, load_config
    from hybrid_jax.training.checkpoint import Checkpoints

    experiment = build(load_config(CONFIG, [f"run_dir={run_dir}", "compilation_cache=null"]))
    state = Checkpoints(run_dir / "checkpoints", 4).newest(experiment.init())
    return 0 if state is None else state.step
