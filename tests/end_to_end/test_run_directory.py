"""What training may write over: what it has written itself, and nothing else."""

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from hybrid_jax import HybridTrainer, evaluate, export, train
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.runs import lock as lock_module
from hybrid_jax.runs.files import run_files
from hybrid_jax.runs.identity import owned


def contents(folder: Path) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def refused(command):
    """The line by which training refuses a run directory."""

    def run(config, run_dir, *overrides) -> str:
        code, out, err = command(train.main, "--config", config, f"run_dir={run_dir}", *overrides)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return run


def written_by_hand(folder, tiny):
    (folder / "config.yaml").write_text((tiny / "config.yaml").read_text() + "# mine\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text('{"step": 0, "phase": "sft"}\n')


def a_model(folder, tiny):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors").write_bytes(b"weights")


def data(folder, tiny):
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')


def an_export_of_ours(folder, tiny):
    a_model(folder, tiny)
    (folder / "hybrid_jax.json").write_text('{"step": 3}\n')


def the_run_of_another_trainer(folder, tiny):
    (folder / "checkpoints" / "100").mkdir(parents=True)
    (folder / "environment.json").write_text('{"packages": {"torch": "2.0"}}')


HOLDS = {
    written_by_hand: "it holds config.yaml, metrics.jsonl, samples.jsonl and 1 more",
    a_model: "it holds config.json, model.safetensors",
    data: "it holds train.jsonl",
    an_export_of_ours: "it holds config.json, hybrid_jax.json, model.safetensors",
    the_run_of_another_trainer: "it holds checkpoints, environment.json",
}


@pytest.mark.parametrize("fill", HOLDS, ids=lambda fill: fill.__name__)
def test_a_folder_that_holds_no_run_of_ours_is_refused_and_left_as_it_is(tmp_path, tiny, refused, fill):
    fill(tmp_path, tiny)
    before = contents(tmp_path)
    message = (
        f"run_dir {tmp_path} is not empty and no run of ours: {HOLDS[fill]}; give a new or an empty folder"
    )
    assert refused(tiny / "config.yaml", tmp_path) == message
    with pytest.raises(UserError) as also:
        HybridTrainer(tiny / "config.yaml", run_dir=tmp_path)
    assert str(also.value) == message
    assert contents(tmp_path) == before


def test_the_folder_of_the_config_the_current_one_home_and_the_root_are_refused(
    tmp_path, tiny, refused, monkeypatch
):
    (tmp_path / "mine.yaml").write_text((tiny / "config.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for run_dir in (tmp_path, ".", "./", "/", Path.home(), tmp_path / ".." / tmp_path.name):
        assert " is not empty and no run of ours: it holds " in refused(tmp_path / "mine.yaml", run_dir)
    assert refused("mine.yaml", "''") == "run_dir must be a path or a URL, got ''"
    assert contents(tmp_path) == before


def test_a_refused_start_leaves_no_folder_behind(tmp_path, tiny, refused):
    refused(tiny / "config.yaml", tmp_path / "new" / "run", "data.train=gone.jsonl")
    assert not list(tmp_path.iterdir())


def without_checkpoints(run_dir, folder):
    shutil.copytree(run_dir, folder)
    shutil.rmtree(folder / "checkpoints")
    return folder


@pytest.mark.slow
def test_a_run_whose_checkpoints_were_removed_keeps_its_records(run_dir, tiny, tmp_path, command, caplog):
    run = without_checkpoints(run_dir, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    for number in (1, 2):
        caplog.clear()
        code, _, _ = command(train.main, "--config", tiny / "config.yaml", f"run_dir={run}", "steps=1")
        assert code == 0
        assert [message for message in caplog.messages if "no checkpoint" in message] == [
            f"run_dir {run} holds the records of a run but no checkpoint to go on from: they are kept in "
            f"earlier_{number}, and training starts at step 0"
        ]
        shutil.rmtree(run / "checkpoints")
    kept = {name.removeprefix("earlier_1/"): text for name, text in contents(run).items()}
    assert {name: kept[name] for name in before} == before
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0
    assert yaml.safe_load((run / "earlier_2" / "config.yaml").read_text())["steps"] == 1


def test_another_training_since_an_experiment_was_built_is_noticed_before_anything_is_written(
    run_dir, tiny, tmp_path
):
    experiment = build(load_config(tiny / "config.yaml", [f"run_dir={tmp_path / 'run'}", "seed=1"]))
    shutil.copytree(run_dir, tmp_path / "run")
    before = contents(tmp_path)
    with (
        pytest.raises(UserError, match="holds a run of another config: seed is 0 there and 1 here"),
        owned(experiment.files),
    ):
        experiment.open()
    assert contents(tmp_path) == before


def test_a_run_that_is_being_trained_is_refused_also_from_a_notebook_and_may_be_read(
    run_dir, tiny, tmp_path, refused, command
):
    """Only another thread or process is refused: here the lock is that of a process that lives, our parent."""

    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    with owned(run_files(run)):
        lock = json.loads((run / "lock.json").read_text())
    parent = lock_module.os.getppid()
    lock |= {"pid": parent, "started": lock_module._started(parent)}
    (run / "lock.json").write_text(json.dumps(lock))
    before = contents(run)
    assert f"run_dir {run} is being trained by process {parent} on " in refused(tiny / "config.yaml", run)
    with pytest.raises(UserError, match=f"run_dir {run} is being trained by process {parent} on "):
        HybridTrainer(tiny / "config.yaml", run_dir=run).train()
    assert command(export.main, "--run", run, "--output", tmp_path / "out")[0] == 0
    assert contents(run) == before


def test_numbers_replace_an_earlier_result_and_no_other_file(run_dir, tmp_path, command):
    for text in ("precious\n", '{"step": 0}\n', '["suite"]'):
        (tmp_path / "numbers.json").write_text(text)
        code, _, err = command(evaluate.main, "--run", run_dir, "--json", tmp_path / "numbers.json")
        message = (
            f"error: --json {tmp_path}/numbers.json is there and holds no earlier result: give a new file\n"
        )
        assert (code, err) == (2, message)
        assert (tmp_path / "numbers.json").read_text() == text


def stopping_at(step, action):
    """A reward that does something once, in the PPO step of this number or the first one after it."""
    left = [action]

    def reward(prompts, responses, **columns):
        if reward.calls >= step and left:
            left.pop()()
        reward.calls += 1
        return [0.0] * len(responses)

    reward.calls = 0
    return reward


@pytest.mark.slow
def test_a_run_goes_on_in_its_directory_when_the_current_folder_changes(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reward = stopping_at(1, lambda: monkeypatch.chdir(tmp_path / "elsewhere"))
    trainer = HybridTrainer(tiny / "config.yaml", reward=reward, run_dir="run", steps=2)
    trainer.train()
    assert Path.cwd() == tmp_path / "elsewhere"
    assert trainer.policy.step == 2
    assert trainer.report() == tmp_path / "here" / "run" / "report.html"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_a_run_whose_directory_is_moved_ends_without_splitting_and_goes_on_where_it_is_now(tiny, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def move():
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "1" / "files.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # else what is being saved goes on at the old place
        run.rename(moved)

    reward = stopping_at(1, move)
    settings = {"steps": 4, "checkpoint": {"every": 1}}
    with pytest.raises(UserError, match=r"run_dir .*/run was moved or removed while it was trained, or "):
        HybridTrainer(tiny / "config.yaml", reward=reward, run_dir=run, **settings).train()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    saved = max(int(path.name) for path in (moved / "checkpoints").iterdir() if path.name.isdecimal())
    assert saved == 1
    trainer = HybridTrainer(tiny / "config.yaml", reward=reward, run_dir=moved, **settings)
    trainer.train()
    steps = [json.loads(line)["step"] for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3, 4}
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
