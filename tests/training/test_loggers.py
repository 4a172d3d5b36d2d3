"""The files of a run: what a resumed run keeps, what a killed one leaves, what a stranger may read."""

import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.training.loggers import LOGGERS, JsonLines, TensorBoard, WeightsAndBiases, open_loggers
from hybrid_jax.training.progress import Progress, sample_table
from hybrid_jax.training.time_left import TimeLeft


def sft_record(step: int, loss: float = 0.5) -> dict:
    return {
        "step": step,
        "phase": "sft",
        "seconds": 1.5 * step,
        "sft/loss": loss,
        "sft/tokens_per_second": 9e3,
    }


def sample_record(step: int, index: int = 0, response: str = "Fine food.") -> dict:
    sample = {"step": step, "phase": "evaluation", "split": "held_out", "index": index}
    return sample | {"prompt": "The Eagle is", "response": response, "score": 0.7, "parts": {"coverage": 0.7}}


def write_steps(logger, steps) -> None:
    for step in steps:
        if step % 3 == 0:
            logger.samples([sample_record(step), sample_record(step, index=1)])
        logger.metrics(sft_record(step, loss=1 / (step + 3)))


def lines_of(run_dir: Path, name: str) -> list[str]:
    return (run_dir / name).read_text().splitlines()


def test_a_killed_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path):
    whole = open_loggers([], tmp_path / "whole", {}, resume_step=None)
    write_steps(whole, range(10))
    whole.close()
    killed = open_loggers([], tmp_path / "killed", {}, resume_step=None)
    write_steps(killed, range(8))  # killed at 8, the last checkpoint is of step 5
    resumed = open_loggers([], tmp_path / "killed", {}, resume_step=5)
    write_steps(resumed, range(5, 10))
    resumed.close()
    killed.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "pha', '{"step": 3', "{", '"step"', "null", '{"step": 3, "x": "\xff']
)
def test_a_torn_last_line_is_dropped_and_the_next_line_stands_alone(tmp_path, torn):
    first = json.dumps(sft_record(2))
    (tmp_path / "metrics.jsonl").write_bytes((first + "\n" + torn).encode("latin-1"))
    logger = JsonLines().open(tmp_path, {}, resume_step=4)
    logger.metrics(sft_record(4))
    logger.close()
    assert lines_of(tmp_path, "metrics.jsonl") == [first, json.dumps(sft_record(4))]


def test_a_run_killed_before_its_first_checkpoint_starts_its_files_anew(tmp_path):
    first = JsonLines().open(tmp_path, {}, resume_step=None)
    write_steps(first, range(3))
    first.close()
    JsonLines().open(tmp_path, {}, resume_step=None).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "samples.jsonl").read_bytes() == b""


def test_every_record_is_on_disk_before_the_next_one_is_computed(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from hybrid_jax.training.loggers import open_loggers\n"
        "logger = open_loggers([], Path(sys.argv[1]), {}, None)\n"
        "logger.metrics({'step': 0, 'phase': 'sft', 'sft/loss': 0.5}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -9
    assert lines_of(tmp_path, "metrics.jsonl") == ['{"step": 0, "phase": "sft", "sft/loss": 0.5}']


def test_lines_are_strict_json_whatever_the_numbers_and_the_text(tmp_path):
    logger = JsonLines().open(tmp_path, {}, resume_step=None)
    logger.metrics(sft_record(np.int32(0), loss=np.float32(0.25)) | {"sft/grad_norm": float("inf")})
    logger.samples([sample_record(0, response="lone \ud800 surrogate\u2028line")])
    logger.close()
    (line,) = lines_of(tmp_path, "metrics.jsonl")
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["step"], record["sft/loss"], record["sft/grad_norm"]) == (0, 0.25, None)
    (line,) = lines_of(tmp_path, "samples.jsonl")
    assert json.loads(line)["response"] == "lone \ud800 surrogate\u2028line"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path):
    logger = JsonLines().open(tmp_path, {}, resume_step=None)
    logger._files["metrics.jsonl"].close()
    logger._files["metrics.jsonl"] = full = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        logger.metrics(sft_record(0))
    with pytest.raises(OSError, match="No space"):
        full.close()
    logger._files["samples.jsonl"].close()


def test_the_registry_names_the_loggers_and_json_lines_are_never_written_twice(tmp_path):
    assert list(LOGGERS) == ["jsonl", "tensorboard", "wandb"]
    logger = open_loggers([JsonLines()], tmp_path, {}, resume_step=None)
    logger.metrics(sft_record(0))
    logger.close()
    assert len(lines_of(tmp_path, "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("component", "module", "extra"),
    [(TensorBoard(), "tensorboardX", "tensorboard"), (WeightsAndBiases(), "wandb", "wandb")],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path, monkeypatch, component, module, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    expected = f"{module}, which is not installed: pip install -e '.\\[{extra}\\]' in the checkout"
    with pytest.raises(UserError, match=expected):
        component.open(tmp_path, {}, None)


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="needs the tensorboard extra")
def test_tensorboard_events_hold_the_scalars_at_their_steps(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    logger = open_loggers([TensorBoard()], tmp_path, {}, resume_step=None)
    for step in range(3):
        logger.metrics(sft_record(step, loss=0.5 * step))
    picked = sample_record(2, response="picked") | {"extreme": {"part": "coverage", "rank": "best"}}
    logger.samples([picked, sample_record(2, response="a | b\nc"), picked])
    logger.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, offset, scalars, texts = file.read_bytes(), 0, [], []
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 8], "little")
        event = Event.FromString(  # a record: length, its checksum, data, its checksum
            data[offset + 12 : offset + 12 + length]
        )
        offset += 16 + length
        for value in event.summary.value:
            if value.tag == "sft/loss":
                scalars.append((event.step, value.simple_value))
            texts += [(event.step, text) for text in value.tensor.string_val]
    assert scalars == [(0, 0.0), (1, 0.5), (2, 1.0)]
    table = b"prompt | response | score\n--- | --- | ---\nThe Eagle is | a \\| b c | 0.700"
    assert texts == [(2, table)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb extra")
def test_wandb_offline_needs_no_network_and_writes_no_secret(tmp_path):
    script = (
        "import sys; from pathlib import Path; from hybrid_jax.training.loggers import *\n"
        "for resume_step in (None, 1):\n"
        "    config = {'api_key': 'hunter2', 'seed': 17}\n"
        "    logger = open_loggers([WeightsAndBiases()], Path(sys.argv[1]), config, resume_step)\n"
        "    logger.metrics({'step': 0, 'phase': 'sft', 'sft/loss': 0.5})\n"
        "    logger.samples([dict(step=0, index=0, prompt='p', response='r', score=0.5)])\n"
        "    picked = dict(step=0, index=0, prompt='p', response='pickedforscore', score=1.0, extreme={})\n"
        "    logger.samples([picked])\n"
        "    logger.close()\n"
    )
    home = {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), "--reward.api_key=hunter2"],
        env=home,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    files = [file for file in (tmp_path / "run" / "wandb").rglob("*") if file.is_file()]
    (recorded, *_) = [file.read_bytes() for file in files if file.suffix == ".wandb"]
    assert b"sft/loss" in recorded
    assert not [file for file in files if b"hunter2" in file.read_bytes()]
    assert not [file for file in files if b"pickedforscore" in file.read_bytes()]


def test_without_a_terminal_progress_is_a_plain_line_now_and_then():
    stream = io.StringIO()
    progress = Progress(total=5, initial=1, stream=stream, line_seconds=1e9)
    for step in range(1, 5):
        progress.time_left.took("sft", 21.0, compiling=0.0 if step > 1 else 20.0)
        progress.update(sft_record(step))
    progress.close()
    first, last = stream.getvalue().splitlines()  # the first step and the last one, none in between
    assert first == "step 2/5  sft  loss 0.500, tokens/s 9,000"  # a step that compiles says nothing of the rest
    assert last == "step 5/5  sft  loss 0.500, tokens/s 9,000  00:00 left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_progress_shows_phase_loss_score_kl_speed_and_time_left():
    stream = Terminal()
    progress = Progress(total=10, initial=4, stream=stream, time_left=TimeLeft(["ppo"] * 6))
    progress.time_left.took("ppo", 18.0)
    record = {"step": 4, "phase": "ppo", "ppo/policy_loss": -0.02, "ppo/score": 0.81, "ppo/kl": 1.5}
    progress.update(record | {"ppo/tokens_per_second": 12345.0})
    progress.update({"step": 5, "phase": "evaluation", "evaluation/score": 0.9})
    progress.close()
    shown = stream.getvalue().split("\r")[-1]
    assert "5/10" in shown
    for part in ("ppo", "loss -0.020", "score 0.810", "KL 1.500", "tokens/s 12,345", "01:30 left"):
        assert part in shown


def test_progress_goes_by_the_metrics_of_a_phase_and_not_by_its_name():
    stream = io.StringIO()
    progress = Progress(total=3, stream=stream, line_seconds=0)
    learnt = {"rl/policy_loss": -0.02, "rl/score": 0.81, "rl/kl": 1.5}
    progress.update({"step": 0, "phase": "rl", "kind": "ppo", **learnt})
    progress.update({"step": 1, "phase": "teach", "kind": "sft", "teach/loss": 2.5})
    progress.update({"step": 2, "phase": "polite", "kind": "my_module:Mine", "polite/score": 0.25})
    assert stream.getvalue().splitlines() == [
        "step 1/3  rl (ppo)  loss -0.020, score 0.810, KL 1.500",
        "step 2/3  teach (sft)  loss 2.500, score 0.810, KL 1.500",  # of the last phase that has any
        "step 3/3  polite (Mine)  score 0.250, KL 1.500",
    ]


def test_the_time_left_says_that_it_is_a_guess_while_a_phase_has_not_run():
    stream = io.StringIO()
    plan = TimeLeft([*["sft"] * 2, "ppo"], costs={"sft": 1.0, "ppo": 60.0})
    progress = Progress(total=3, stream=stream, line_seconds=0, time_left=plan)
    for step, phase in enumerate(["sft", "sft", "ppo"]):
        plan.took(phase, 1.0)
        progress.update({"step": step, "phase": phase})
    assert stream.getvalue().splitlines() == [
        "step 1/3  sft  about 01:01 left",
        "step 2/3  sft  about 01:00 left",
        "step 3/3  ppo  00:00 left",
    ]


def test_what_is_logged_while_a_bar_is_shown_stands_on_a_line_of_its_own():
    stream = Terminal()
    console = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(console)
    try:
        progress = Progress(total=10, stream=stream)
        replaced = [h for h in logging.getLogger().handlers if type(h).__name__ == "_TqdmLoggingHandler"]
        progress.close()
        assert len(replaced) == 1
        assert console in logging.getLogger().handlers
    finally:
        logging.getLogger().removeHandler(console)


def test_the_table_of_samples_leaves_out_those_that_were_picked_for_their_scores():
    stream = io.StringIO()
    progress = Progress(total=1, stream=stream)
    picked = sample_record(0, response="Picked.") | {"extreme": {"part": "coverage", "rank": "best"}}
    progress.samples([picked])
    assert stream.getvalue() == ""
    progress.samples([picked, sample_record(0), picked])
    progress.close()
    assert [line.split()[3] for line in stream.getvalue().splitlines()[1:]] == ["Fine"]


@pytest.mark.parametrize("width", [24, 40, 80, 200])
def test_a_sample_table_fits_its_width_and_steers_no_terminal(width):
    texts = ["short", "long " * 90, "two\nlines", "red \x1b[31m \x07 alert", "寿司 " * 60, "e\u0301" * 100]
    table = sample_table([sample_record(0, response=text) for text in texts], width)
    assert len(table.splitlines()) == len(texts) + 1
    assert "\x1b" not in table
    assert "\x07" not in table
    for line in table.splitlines():
        wide = sum(1 for character in line if character in "寿司")
        marks = line.count("\u0301")
        assert len(line) + wide - marks == width
