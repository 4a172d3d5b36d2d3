"""Real processes on loopback, each with two devices: what they do together is what one does alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "debug" / "hybrid.yaml"
CACHE = ROOT / ".pytest_cache" / "jax"  # of compiled programs
SMALL = (
    "model.width=16",
    "phases.ppo.sampler.max_new_tokens=4",
    "phases.ppo.epochs=1",
    "scheduler={name: alternation, warmup: {sft: 1}, cycle: {ppo: 1, sft: 1}}",
    "evaluation={num_prompts: 6, num_examples: 8, num_shown: 3, batch_size: 8, length: 96}",
    "mesh={data: 2, fsdp: 2}",
)
EVERY_STEP = ("steps=5", "checkpoint={every: 1, keep: 2}")
QUICKLY_COMPILED = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(run_dir, *overrides, processes, devices=4):
    """The same command in each process, which share the devices."""
    address = f"127.0.0.1:{free_port()}"
    settings = [f"run_dir={run_dir}", f"compilation_cache={CACHE}", *SMALL, *overrides]
    command = [sys.executable, "-m", "hybrid_jax.train", "--config", str(CONFIG), *settings]
    flags = f"{QUICKLY_COMPILED} --xla_force_host_platform_device_count={devices // processes}"
    started = []
    for index in range(processes):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        started.append(
            subprocess.Popen(
                command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
            )
        )
    return started


def ends(processes, seconds=300):
    """Exit codes and what was written to stderr."""
    try:
        errors = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def run(run_dir, *overrides, processes, devices=4):
    codes, errors = ends(start(run_dir, *overrides, processes=processes, devices=devices))
    assert codes == [0] * processes, "\n".join(errors)
    return errors


def wait_for(path, processes):
    while not path.exists():
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.02)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run_dir, other):
    """The same records, but for rounding and time; the same samples."""
    records, others = metrics(run_dir), metrics(other)
    assert [(r["step"], r["phase"]) for r in records] == [(r["step"], r["phase"]) for r in others]
    for record, expected in zip(records, others, strict=True):
        names = [n for n in expected if n.endswith(("loss", "score", "perplexity", "kl", "grad_norm"))]
        assert names
        for name in names:
            assert record[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (record["step"], name)
    assert (run_dir / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process with four devices, five steps without a break."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder, *EVERY_STEP, processes=1)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Two processes, one of which is told to stop in the second step; how they ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    processes = start(folder, *EVERY_STEP, processes=2)
    wait_for(folder / "checkpoints" / "1", processes)
    processes[1].send_signal(signal.SIGTERM)
    return folder, ends(processes), sorted(int(p.name) for p in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_sigterm_at_one_process_makes_all_save_the_same_step_and_end_with_143(stopped):
    folder, (codes, errors), steps = stopped
    assert codes == [143, 143], "\n".join(errors)
    assert "Traceback" not in "".join(errors)
    last = max(record["step"] for record in metrics(folder) if record["phase"] != "evaluation")
    assert steps[-1] == last + 1 < 5


def test_a_run_of_two_processes_goes_on_in_one_with_fewer_devices_and_equals_one_alone(stopped, alone):
    folder = stopped[0]
    errors = run(folder, *EVERY_STEP, "mesh={data: 2, fsdp: 1}", processes=1, devices=2)
    assert "resumed" in errors[0]
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_message_and_the_same_command_goes_on(tmp_path, alone):
    folder = tmp_path / "run"
    processes = start(folder, *EVERY_STEP, processes=2)
    wait_for(folder / "checkpoints" / "3", processes)
    killed = time.monotonic()
    processes[1].kill()
    codes, errors = ends(processes)
    assert codes == [2, -9], "\n".join(errors)
    assert time.monotonic() - killed < 30  # measured 0.3 s on a machine with time to spare
    assert "error: process 1 of 2 is gone: it was killed" in errors[0]
    assert "Traceback" not in errors[0]
    run(folder, *EVERY_STEP, processes=2)
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_two_processes_without_a_break_equal_one_and_export_what_it_does(tmp_path, alone):
    folder = tmp_path / "run"
    run(folder, *EVERY_STEP, "checkpoint={every: 2, export_every: 5}", processes=2)
    assert_same_run(folder, alone)
    assert {path.name for path in folder.iterdir()} - {"exports"} == {path.name for path in alone.iterdir()}
    run(alone, *EVERY_STEP, "checkpoint={every: 2, export_every: 5}", processes=1)
    there, expected = (f / "exports" / "step_5" / "model.safetensors" for f in (folder, alone))
    there, expected = tensors(there), tensors(expected)
    assert there.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(there[name], tensor, rtol=1e-4, atol=1e-6)


def tensors(path):
    from safetensors.numpy import load_file

    return load_file(path)
