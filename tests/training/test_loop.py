import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core import waiting
from hybrid_jax.core.errors import UserError
from hybrid_jax.training.checkpoint import CheckpointConfig, Checkpoints, SaveError
from hybrid_jax.training.interrupts import Interrupted
from hybrid_jax.training.loggers import open_loggers, read_records
from hybrid_jax.training.loop import train
from hybrid_jax.training.out_of_memory import OutOfMemory
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.recorder import Recorder
from hybrid_jax.training.scheduler import Alternation
from hybrid_jax.training.state import RunState, TrainState


@jax.jit
def walk(params, key):
    return params + jax.random.normal(key, params.shape)


consume = jax.jit(walk, donate_argnums=0)


@dataclass
class Walk:
    """A phase whose parameters take a random step. ``before`` and ``after`` are called around the update."""

    name: str
    kind: str = "walk"
    optimizer_key: str = "shared"
    waits_for_device: bool = False
    before: Any = None
    after: Any = None

    def step(self, state, key):
        if self.before:
            self.before(state)
        params = consume(state.train.params["w"], key)
        if self.after:
            self.after(state)
        cursors = {**state.cursors, self.name: state.cursors.get(self.name, 0) + 2}
        host = {**state.host, "mean": np.asarray(0.9 * state.host["mean"] + 0.1 * state.step)}
        train = state.train.replace(params={"w": params})
        metrics = {f"{self.name}/first": params[0], f"{self.name}/dispatch_seconds": 0.5}
        return dataclasses.replace(state, train=train, cursors=cursors, host=host), metrics


@dataclass
class Walking:
    """What `train` needs of an experiment, without a model."""

    folder: Path
    steps: int = 8
    every: int = 3
    sft: Walk = field(default_factory=lambda: Walk("sft"))
    ppo: Walk = field(default_factory=lambda: Walk("ppo", waits_for_device=True))
    during_evaluation: Any = None
    evaluate_at: tuple[int, ...] = (0, 4)
    finished: int = 0

    key = jax.random.key(7)
    offload = ()
    scheduler = Alternation(warmup={"sft": 2}, cycle={"sft": 1, "ppo": 1})

    @property
    def phases(self):
        return {"sft": self.sft, "ppo": self.ppo}

    @property
    def checkpoint(self):
        return CheckpointConfig(every=self.every, keep=3)

    def init(self):
        train = TrainState(params={"w": jnp.zeros(50)}, opt_state={}, extra={"k": jnp.asarray(0.5)})
        return RunState(step=0, train=train, host={"mean": np.asarray(0.0), "observed": np.asarray(0)})

    def owned(self):
        return contextlib.nullcontext()

    def open(self):
        checkpoints = Checkpoints(self.folder / "checkpoints", 3)
        state = checkpoints.newest(self.init())
        logger = open_loggers((), self.folder, {}, state and state.step)
        with open(os.devnull, "w") as nowhere:
            progress = Progress(self.steps, stream=nowhere)
        progress._write = lambda text: None
        return state or self.init(), checkpoints, Recorder(logger, progress)

    def evaluation_is_due(self, state, next_phase):
        return state.step in self.evaluate_at or state.step == self.steps

    def evaluate(self, state):
        if self.during_evaluation:
            self.during_evaluation(state)
        sample = {
            "step": state.step,
            "phase": "evaluation",
            "index": 0,
            "prompt": "p",
            "response": "r",
            "score": 0,
        }
        return {"evaluation/first": float(state.train.params["w"][0])}, [sample]

    def export(self, state, folder=None):
        raise AssertionError("no export was asked for")

    def observe(self, state, numbers):
        count = np.asarray(state.host["observed"] + 1)
        return dataclasses.replace(state, host={**state.host, "observed": count})

    def finish(self, state):
        self.finished += 1


def at(step, action):
    """Calls ``action`` at one step only, and the first time only."""
    left = [step]

    def hook(state):
        if state.step in left:
            left.remove(state.step)
            action()

    return hook


def fail(error):
    def action():
        raise error

    return action


def send(number):
    return lambda: os.kill(os.getpid(), number)


def bits(state):
    parts = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.train, dict(state.host)))]
    return parts, state.step, dict(state.cursors), dataclasses.asdict(state.schedule)


def log_lines(folder):
    """Records of both logs without timings; a torn line would not parse."""
    lines = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (folder / name).read_text().splitlines():
            lines.append({k: v for k, v in json.loads(line).items() if not k.endswith("seconds")})
    return lines


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The final bits and the logs of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    return bits(train(Walking(folder))), log_lines(folder)


def assert_goes_on_to(unbroken, folder):
    run = Walking(folder)
    state = train(run)
    assert (bits(state), log_lines(folder)) == unbroken
    assert bits(Checkpoints(folder / "checkpoints", 3).newest(run.init())) == unbroken[0]
    assert run.finished == 1


def test_a_run_takes_its_steps_logs_each_once_and_saves_every_few(tmp_path):
    run = Walking(tmp_path)
    state = train(run)
    expected, key = jnp.zeros(50), jax.random.key(7)
    for step in range(8):
        expected = walk(expected, jax.random.fold_in(key, step))
    assert np.asarray(state.train.params["w"]).tobytes() == np.asarray(expected).tobytes()
    assert state.schedule.steps == {"sft": 5, "ppo": 3}
    assert state.cursors == {"sft": 10, "ppo": 6}
    assert saved_steps(tmp_path) == [3, 6, 8]
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [(r["step"], r["phase"]) for r in records] == [
        (0, "evaluation"),
        (0, "sft"),
        (1, "sft"),
        (2, "sft"),
        (3, "ppo"),
        (4, "evaluation"),
        (4, "sft"),
        (5, "ppo"),
        (6, "sft"),
        (7, "ppo"),
        (8, "evaluation"),
    ]
    assert {(r["phase"], r["kind"]) for r in records} == {
        ("sft", "walk"),
        ("ppo", "walk"),
        ("evaluation", "evaluation"),
    }
    assert state.host["observed"] == 2  # before steps 0 and 4; nothing learns from the evaluation at the end
    assert run.finished == 1


@pytest.mark.parametrize("step", range(8))
def test_a_run_that_stops_dead_in_any_step_goes_on_to_the_same_bits_and_logs(unbroken, tmp_path, step):
    # A second Ctrl-C saves nothing, so a KeyboardInterrupt out of nowhere is a kill as far as files go.
    phase = (
        Walk("sft", before=at(step, fail(KeyboardInterrupt()))),
        Walk("ppo", before=at(step, fail(KeyboardInterrupt()))),
    )
    with pytest.raises(KeyboardInterrupt):
        train(Walking(tmp_path, sft=phase[0], ppo=phase[1]))
    # A save may still be under way, and the pending metrics were not written.
    assert_goes_on_to(unbroken, tmp_path)


def test_a_finished_run_does_nothing_more_and_writes_its_last_evaluation_again(unbroken, tmp_path):
    train(Walking(tmp_path))
    assert_goes_on_to(unbroken, tmp_path)


def test_more_steps_continue_a_finished_run_as_if_it_had_been_longer_and_keep_its_last_evaluation(
    unbroken, tmp_path
):
    train(Walking(tmp_path, steps=5))
    evaluation = [line for line in log_lines(tmp_path) if line["step"] == 5]
    assert len(evaluation) == 2  # numbers and a sample
    assert bits(train(Walking(tmp_path))) == unbroken[0]
    lines = log_lines(tmp_path)
    assert [line for line in lines if line["step"] == 5 and line["phase"] == "evaluation"] == evaluation
    assert [line for line in lines if line not in evaluation] == unbroken[1]


def test_fewer_steps_than_a_run_has_taken_end_it_at_once_and_keep_its_last_evaluation(tmp_path):
    before = train(Walking(tmp_path))
    lines = log_lines(tmp_path)
    after = train(Walking(tmp_path, steps=5, evaluate_at=()))
    assert bits(after) == bits(before)
    assert log_lines(tmp_path) == lines
    assert [line["step"] for line in lines if line["phase"] == "evaluation"] == [0, 4, 8, 0, 4, 8]


def test_the_last_evaluation_of_a_finished_run_is_lost_by_none_that_fails_after_it(tmp_path):
    train(Walking(tmp_path))
    lines = log_lines(tmp_path)
    with pytest.raises(UserError, match="no key"):
        train(Walking(tmp_path, during_evaluation=at(8, fail(UserError("no key")))))
    assert log_lines(tmp_path) == lines


def test_a_fall_back_to_an_older_checkpoint_drops_the_lines_of_the_steps_after_it(unbroken, tmp_path):
    train(Walking(tmp_path))
    for step in (6, 8):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
    run = Walking(tmp_path)
    state, _, recorder = run.open()
    recorder.close()
    assert state.step == 3
    assert all(line["step"] < 3 for line in log_lines(tmp_path))
    assert_goes_on_to(unbroken, tmp_path)


def test_a_failing_step_leaves_the_state_before_it_saved(unbroken, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ppo = Walk("ppo", before=at(5, fail(UserError("the reward fails"))))
    with pytest.raises(UserError, match="the reward fails"):
        train(Walking(tmp_path, ppo=ppo))
    assert saved_steps(tmp_path) == [3, 5]
    assert "saved the state after 5 steps" in caplog.messages
    assert [line["step"] for line in log_lines(tmp_path) if "sft/first" in line] == [0, 1, 2, 4]
    assert_goes_on_to(unbroken, tmp_path)


def test_a_step_that_fails_right_after_an_evaluation_is_repeated_from_before_it(unbroken, tmp_path):
    with pytest.raises(UserError, match="the data fails"):
        train(Walking(tmp_path, sft=Walk("sft", before=at(4, fail(UserError("the data fails"))))))
    assert saved_steps(tmp_path) == [3, 4]
    assert Checkpoints(tmp_path / "checkpoints", 3).newest(Walking(tmp_path).init()).host["observed"] == 1
    assert_goes_on_to(unbroken, tmp_path)


def test_a_step_that_fails_after_it_has_consumed_the_state_saves_nothing(unbroken, tmp_path, caplog):
    ppo = Walk("ppo", after=at(5, fail(UserError("too late"))))
    with pytest.raises(UserError, match="too late"):
        train(Walking(tmp_path, ppo=ppo))
    assert saved_steps(tmp_path) == [3]
    assert not caplog.records
    assert_goes_on_to(unbroken, tmp_path)


def test_a_failing_evaluation_leaves_the_state_saved(unbroken, tmp_path):
    with pytest.raises(UserError, match="no answers"):
        train(Walking(tmp_path, during_evaluation=at(4, fail(UserError("no answers")))))
    assert saved_steps(tmp_path) == [3, 4]
    assert_goes_on_to(unbroken, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_step_saves_after_that_step_and_ends_with_its_code(unbroken, tmp_path, number, code):
    before = signal.getsignal(number)
    sft = Walk("sft", before=at(4, send(number)))
    with pytest.raises(Interrupted) as interrupted:
        train(Walking(tmp_path, sft=sft))
    assert interrupted.value.code == code
    assert saved_steps(tmp_path) == [3, 5]
    assert signal.getsignal(number) is before
    assert_goes_on_to(unbroken, tmp_path)


def test_a_signal_during_an_evaluation_saves_before_another_step_is_taken(unbroken, tmp_path):
    with pytest.raises(Interrupted):
        train(Walking(tmp_path, during_evaluation=at(4, send(signal.SIGTERM))))
    assert saved_steps(tmp_path) == [3, 4]
    assert_goes_on_to(unbroken, tmp_path)


def test_a_signal_before_the_first_step_has_nothing_to_save(unbroken, tmp_path):
    with pytest.raises(Interrupted):
        train(Walking(tmp_path, during_evaluation=at(0, send(signal.SIGTERM))))
    assert not (tmp_path / "checkpoints").exists()
    assert_goes_on_to(unbroken, tmp_path)


def test_a_second_ctrl_c_aborts_at_once(unbroken, tmp_path, ctrl_c):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Walking(tmp_path, every=100, sft=Walk("sft", before=at(4, twice))))
    assert not (tmp_path / "checkpoints").exists()
    assert_goes_on_to(unbroken, tmp_path)


def test_a_run_trains_outside_the_main_thread_where_no_signal_arrives(unbroken, tmp_path):
    result = []
    thread = threading.Thread(target=lambda: result.append(bits(train(Walking(tmp_path)))))
    thread.start()
    thread.join()
    assert (result[0], log_lines(tmp_path)) == unbroken


def test_a_checkpoint_that_fails_ends_the_run_before_its_next_step(tmp_path, monkeypatch):
    def no_space(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    def until_it_has_failed(state):
        if state.step == 3:
            concurrent.futures.wait(list(Checkpoints._saving.values()))

    steps = []
    monkeypatch.setattr(Checkpoints, "_saving", {})
    monkeypatch.setattr("hybrid_jax.training.checkpoint._seal", no_space)
    phase = Walk("sft", before=lambda state: (steps.append(state.step), until_it_has_failed(state)))
    run = Walking(tmp_path, sft=phase)
    run.scheduler = Alternation(warmup={}, cycle={"sft": 1})
    with pytest.raises(SaveError, match="checkpoint 3 cannot be written: no space left on the disk"):
        train(run)
    assert steps == [0, 1, 2, 3]  # and not up to the next save, at step 6


def test_a_disk_that_is_full_for_the_metrics_is_one_clear_error(small_disk, capfd):
    def fill():
        filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, bytes(1 << 12))
        os.close(filler)

    (small_disk / "metrics.jsonl").write_bytes(b"\n" * 4096)  # so that the next line needs a new block
    run = Walking(small_disk, every=100, sft=Walk("sft", before=at(1, fill)))
    padding = {"evaluation/first": 0.0, **{f"evaluation/{i}": 0.123456789 for i in range(300)}}
    run.evaluate = lambda state: (padding, [])
    run.evaluate_at = (0, 2, 3, 4)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        train(run)
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "filler").unlink()
    train(Walking(small_disk))  # and the run goes on


def test_a_disk_that_is_full_for_a_checkpoint_is_reported_once(tmp_path, monkeypatch, caplog):
    def fail_to_seal(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybrid_jax.training.checkpoint._seal", fail_to_seal)
    with pytest.raises(SaveError, match="checkpoint 3 cannot be written: no space left"):
        train(Walking(tmp_path))
    assert not caplog.records


def test_an_error_on_the_way_out_does_not_hide_the_first_one(tmp_path, monkeypatch, caplog):
    def fail_to_seal(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybrid_jax.training.checkpoint._seal", fail_to_seal)
    ppo = Walk("ppo", before=at(3, fail(UserError("the reward fails"))))
    with pytest.raises(UserError, match="the reward fails"):
        train(Walking(tmp_path, every=100, ppo=ppo))
    assert "the state after 3 steps could not be saved: checkpoint 3 cannot be written" in caplog.text


def test_a_step_that_runs_out_of_memory_is_explained_and_leaves_the_state_before_it_saved(tmp_path):
    broken = Walking(tmp_path)
    broken.sft.before = at(4, fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")))
    with pytest.raises(OutOfMemory, match=r"sft: a device is out of memory; what helps: .*plan"):
        train(broken)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "4"}
    assert train(Walking(tmp_path)).step == 8


@pytest.mark.parametrize("every", [1, 2])
def test_the_first_ctrl_c_ends_a_step_that_waits_for_a_server_and_saves_the_one_before(
    tmp_path, ctrl_c, caplog, every
):
    def ask(state):
        os.kill(os.getpid(), signal.SIGINT)
        waiting.result_of(Future())  # a server that never answers

    caplog.set_level(logging.INFO, "hybrid_jax")
    with pytest.raises(Interrupted) as stopped:
        train(Walking(tmp_path, every=every, ppo=Walk("ppo", before=ask)))
    assert stopped.value.code == 130
    assert caplog.messages[-1] == "stopped at step 3: saved; the same command goes on"
    assert Checkpoints(tmp_path / "checkpoints", 3).newest(Walking(tmp_path).init()).step == 3
    assert train(Walking(tmp_path)).step == 8  # nothing of the request is left
