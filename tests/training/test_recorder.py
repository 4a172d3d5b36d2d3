"""What a record says of speed and memory: where the seconds went, what was compiled, traced and used."""

import errno
import io
import logging
import os
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.planning.accelerators import accelerator_of
from hybrid_jax.training import compilation
from hybrid_jax.training.compilation import Compilations, Compiled, cache_folder, keep_compiled, summary
from hybrid_jax.training.loggers import without_timings
from hybrid_jax.training.machine import Machine, peak_flops, peak_memory
from hybrid_jax.training.profiler import ProfileConfig, Profiler
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.recorder import Recorder

CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


class Logged:
    def __init__(self):
        self.records = []

    def metrics(self, record):
        self.records.append(record)

    def samples(self, records):
        pass

    def close(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Time that only a test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("hybrid_jax.training.recorder.time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def recorder_of(machine=None, profiler=None, total=10):
    logged = Logged()
    with open(os.devnull, "w") as nowhere:
        progress = Progress(total, stream=nowhere)
    progress._write = lambda text: None
    return Recorder(logged, progress, machine=machine, profiler=profiler), logged.records


@dataclass
class Device:
    device_kind: str = "cpu"
    peak: int | None = None

    def memory_stats(self):
        return None if self.peak is None else {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}


def test_the_seconds_of_a_step_are_split_and_what_is_left_is_the_update(clock):
    recorder, records = recorder_of()
    parts = {"input_seconds": 0.5, "rollout_seconds": 2.0, "reward_seconds": 0.25, "score_seconds": 1.0}
    clock.seconds = 110.0
    recorder.add(0, "ppo", "ppo", {f"ppo/{name}": value for name, value in {**parts, "tokens": 400}.items()})
    recorder.flush()
    assert records[0]["ppo/seconds"] == 10.0
    assert records[0]["ppo/update_seconds"] == 6.25
    assert records[0]["ppo/tokens_per_second"] == 40.0
    assert "ppo/tokens" not in records[0]
    assert "ppo/mfu" not in records[0]


def test_a_phase_that_says_nothing_of_its_time_is_not_split(clock):
    recorder, records = recorder_of()
    recorder.add(0, "sft", "sft", {"sft/loss": 1.0})
    recorder.flush()
    assert records == [
        {"step": 0, "phase": "sft", "kind": "sft", "seconds": 0.0, "sft/loss": 1.0, "sft/seconds": 0.0}
    ]


def test_what_happens_between_two_steps_is_logged_and_is_no_steps_time(clock):
    recorder, records = recorder_of()
    clock.seconds = 101.0
    recorder.add(0, "sft", "sft", {})
    with recorder.between_steps("checkpoint"):  # the step's metrics come first
        clock.seconds = 104.0
    with recorder.between_steps("evaluation"):
        clock.seconds = 111.0
    recorder.evaluation(1, {"evaluation/score": 0.5}, [])
    clock.seconds = 113.0
    recorder.add(1, "sft", "sft", {})
    with recorder.between_steps("checkpoint"):
        clock.seconds = 120.0
    recorder.add(2, "sft", "sft", {})
    clock.seconds = 124.0
    recorder.flush()
    first, evaluation, second, third = records
    assert [record["sft/seconds"] for record in (first, second, third)] == [1.0, 2.0, 4.0]
    assert evaluation["time/checkpoint_seconds"] == 3.0
    assert evaluation["time/evaluation_seconds"] == 7.0
    assert not any(name.startswith("time/") for name in second)
    assert third["time/checkpoint_seconds"] == 7.0


def test_utilisation_is_the_arithmetic_needed_over_that_of_all_devices(clock):
    machine = Machine([Device("TPU v5 lite")] * 4)  # 4 × 197e12 a second
    recorder, records = recorder_of(machine)
    clock.seconds = 102.0
    recorder.add(0, "sft", "sft", {"sft/flops": 394e12})
    recorder.flush()
    assert records[0]["sft/mfu"] == pytest.approx(0.25)
    assert "sft/flops" not in records[0]


def test_on_a_device_of_unknown_peak_there_is_no_utilisation_unless_one_is_given(clock):
    for peak, expected in ((None, None), (2.0, 0.05)):
        recorder, records = recorder_of(Machine(jax.devices()[:2], peak))
        clock.seconds += 10.0
        recorder.add(0, "sft", "sft", {"sft/flops": 2e12})
        recorder.flush()
        assert records[0].get("sft/mfu") == expected
        assert "sft/flops" not in records[0]


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_published_peaks_by_kind_of_device(kind, tflops):
    assert peak_flops([Device(kind)] * 3) == 3 * tflops * 1e12
    if planned := accelerator_of(kind):  # a plan divides a chip among its devices
        assert planned.peak_flops / planned.devices == tflops * 1e12


def test_the_peak_of_unknown_devices_is_unknown():
    assert peak_flops([Device("cpu")]) is None
    assert peak_flops([Device("cpu")] * 2, peak_tflops=1.5) == 3e12


def test_peak_memory_is_the_fullest_devices_or_is_said_to_be_the_hosts():
    assert peak_memory([Device(peak=300), Device(peak=700)]) == {"memory/peak_bytes": 700.0}
    ballast = np.ones(2**25)  # 256 MiB
    assert list(here := peak_memory(jax.devices())) == ["memory/host_peak_bytes"]
    assert ballast.nbytes < here["memory/host_peak_bytes"] < 64 * 2**30
    assert here["memory/host_peak_bytes"] >= resident_bytes()


def resident_bytes():
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") * 0.9  # pages may have gone since


def test_compilations_are_counted_by_function_and_only_once():
    compilations = Compilations()

    def triple(x):
        return 3 * x

    tripled = jax.jit(triple)
    x, y = np.ones(7, np.float32), np.ones(9, np.float32)
    compilations.new()
    before = compilations.count
    tripled(x)
    first = compilations.new()
    tripled(x)
    assert compilations.new() == []
    tripled(y)
    assert [c.function for c in first + compilations.new()] == ["triple", "triple"]
    assert compilations.count - before == 2
    assert 0 < first[0].seconds < 60
    assert compilations.seconds >= first[0].seconds


def test_compiled_programs_are_kept_where_a_config_says(tmp_path, monkeypatch):
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        keep_compiled(None)
        keep_compiled(cache_folder(), instead=False)  # the tests have one already
        assert jax.config.jax_compilation_cache_dir == before["jax_compilation_cache_dir"]
        keep_compiled(cache_folder())
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "hybrid_jax" / "compiled")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_programs_are_summed_up_by_function_the_longest_first():
    programs = [Compiled("copy", 0.04), Compiled("learn", 3.21), Compiled("copy", 0.11)]
    assert summary(programs) == "learn (3.2 s), copy (0.1 s, 2 programs)"


def test_a_program_that_is_compiled_after_a_phases_first_step_is_reported(caplog):
    recorder, _ = recorder_of()

    @jax.jit
    def double(x):
        return x + x

    shapes = {0: (3, "sft"), 1: (3, "sft"), 2: (4, "ppo"), 3: (5, "sft")}
    said = {}
    for step, (size, phase) in shapes.items():
        array = np.ones((size, 13), np.float32)
        caplog.clear()
        with caplog.at_level(logging.WARNING), recorder.step(step, phase, "phases.ppo.prompt_buckets"):
            double(array)
        said[step] = caplog.messages
    assert [said[step] for step in range(3)] == [[], [], []]  # the first step of a phase may compile
    assert len(said[3]) == 1
    assert said[3][0].startswith("step 3: sft met new shapes and compiled double (")
    assert said[3][0].endswith("; see phases.ppo.prompt_buckets")


def test_a_second_program_that_a_phase_has_planned_is_announced_and_no_surprise(caplog):
    recorder, _ = recorder_of()
    add = jax.jit(lambda x, times: x + times, static_argnames="times")
    with caplog.at_level(logging.INFO):
        for step, stage in enumerate(["value alone", "value alone", "", ""]):
            with recorder.step(step, "ppo", stage=stage):
                add(np.ones(19, np.float32), len(stage))
    assert [message.partition(" in ")[0] for message in caplog.messages] == [
        "compiling ppo (value alone) … (first step)",
        "compiled ppo (value alone)",
        "compiling ppo … (first step)",
        "compiled ppo",
    ]


def test_what_compiles_for_the_first_time_says_so_before_and_after(caplog):
    recorder, _ = recorder_of()

    @jax.jit
    def triple(x):
        return 3 * x

    with caplog.at_level(logging.INFO):
        for step in range(2):
            with recorder.between_steps("evaluation"), recorder.between_steps("checkpoint"):
                pass
            with recorder.step(step, "sft"):
                assert caplog.messages[-1] == "compiling sft … (first step)" or step
                triple(np.ones(17, np.float32))
    compiled = r"in \d+\.\d s \(its first {} took \d+\.\d s\)"
    assert len(caplog.messages) == 4
    assert caplog.messages[0] == "compiling evaluation … (first time)"
    assert re.fullmatch(f"compiled evaluation {compiled.format('time')}", caplog.messages[1])
    assert re.fullmatch(f"compiled sft {compiled.format('step')}", caplog.messages[3])


def test_the_time_left_does_not_count_what_was_compiled(clock):
    recorder, _ = recorder_of(total=590)
    for step in range(20):
        with recorder.step(step, "sft"):
            if step == 0:
                compilation._compiled.append(Compiled("update", 29.0))
                clock.seconds += 29.0
            clock.seconds += 0.1
        recorder.add(step, "sft", "sft", {})
        recorder.flush()
    assert recorder._progress.time_left.seconds(570) == pytest.approx(
        57.0
    )  # not the 14 minutes of all 20 steps


def test_memory_and_compilations_are_in_every_record_of_a_step(clock):
    recorder, records = recorder_of(Machine(jax.devices()))
    for step in range(2):
        recorder.add(step, "sft", "sft", {})
    recorder.flush()
    for record in records:
        assert record["memory/host_peak_bytes"] > 0
        assert record["compile/count"] >= 0
        assert record["compile/seconds"] >= 0


def test_only_the_machines_day_is_left_out_of_a_comparison():
    record = {
        **{"step": 1, "phase": "ppo", "seconds": 1.0, "ppo/kl": 0.1, "ppo/update_seconds": 1.0},
        **{"ppo/mfu": 0.4, "ppo/tokens_per_second": 3.0, "memory/peak_bytes": 1.0, "compile/count": 3},
    }
    assert without_timings(record) == {"step": 1, "phase": "ppo", "ppo/kl": 0.1}


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    profiler = Profiler(ProfileConfig(start=2, steps=2), tmp_path / "profile")
    recorder, _ = recorder_of(profiler=profiler)
    running = []
    for step in range(6):
        with recorder.step(step, "sft"):
            running.append(profiler._is_tracing)
        recorder.add(step, "sft", "sft", {"sft/loss": jnp.ones(())})
    recorder.close()
    # The metrics of step 3 arrive while step 4 is being started.
    assert running == [False, False, True, True, True, False]
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"step_num" in trace.read_bytes()


def test_a_run_that_ends_within_its_profile_still_writes_it(tmp_path):
    recorder, _ = recorder_of(profiler=Profiler(ProfileConfig(start=0, steps=9), tmp_path))
    with recorder.step(0, "sft"):
        pass
    recorder.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_an_impossible_profile_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ProfileConfig(steps=0)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        ProfileConfig(start=-1)


def test_a_stream_that_cannot_be_written_costs_the_lines_and_not_the_run():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    progress = Progress(total=3, stream=Full())
    for step in range(3):
        progress.update({"step": step, "phase": "sft", "sft/loss": 1.0})
    progress.close()
