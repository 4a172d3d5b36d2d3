"""What makes a run the same run, what is said of one that is not, and how to change it on purpose."""

import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
import yaml

from hybrid_jax import HybridTrainer, train
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.runs.changes import CHANGES_FILE, differences
from hybrid_jax.training import checkpoint
from hybrid_jax.training.loggers import read_records

RATE = "phases.sft.optimizer.learning_rate"


def open_again(experiment):
    """What a resumed run does before its first step; gives the state."""
    with experiment.owned():
        state, checkpoints, recorder = experiment.open()
        checkpoints.close()
        recorder.close()
    return state


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def changes(folder):
    """Name, step, before and after of all that has changed in a run."""
    lines = read_records(folder / CHANGES_FILE)
    return [(line["name"], line["step"], line["before"], line["after"]) for line in lines]


@pytest.fixture
def copy(tiny, run_dir, tmp_path, caplog):
    """Opens a copy of a finished run with other settings."""
    caplog.set_level(logging.INFO, "hybrid_jax")
    shutil.copytree(run_dir, tmp_path / "run")

    def again(*overrides, **options):
        config = load_config(tiny / "config.yaml", [f"run_dir={tmp_path / 'run'}", *overrides])
        return open_again(build(config, **options))

    again.folder = tmp_path / "run"
    return again


@pytest.fixture
def own_data(tiny, tmp_path):
    """The settings of a copy of the data, and the copy."""
    path = tmp_path / "data.jsonl"
    path.write_text((tiny / "data.jsonl").read_text())
    return [f"data.train={path}"], path


def test_the_same_run_goes_on_without_a_word(copy, caplog):
    assert copy().step == 3
    assert warnings(caplog) == []
    assert changes(copy.folder) == []


@pytest.mark.slow
def test_other_rows_under_the_same_name_are_told_with_their_numbers_and_kept_as_a_change(copy, tiny, caplog):
    path = tiny / "data.jsonl"
    before = path.read_text()
    assert before.count('"say 3:"') == 1
    try:
        path.write_text(
            before.replace('"say 3:", "completion": "3 it is"', '"say 3:", "completion": "4 it is"')
        )
        copy()
        path.write_text(before + json.dumps({"prompt": "say 99:", "completion": "x", "number": 9}) + "\n")
        copy()
    finally:
        path.write_text(before)
    one, two = warnings(caplog)
    assert one.startswith(
        "the run goes on at step 3 with other contents under the same settings: data.train (32 "
    )
    assert "data.held_out" not in one
    assert (two.count("32 rows, "), two.count("33 rows, ")) == (1, 1)
    assert [change[:2] for change in changes(copy.folder)] == [("data.train", 3)] * 2


def test_the_same_file_by_another_path_is_no_other_config(copy, tiny, caplog, monkeypatch):
    monkeypatch.chdir(tiny)
    assert copy("data.train=./data.jsonl").step == 3
    assert warnings(caplog) == []
    assert changes(copy.folder) == []
    shutil.copy(tiny / "data.jsonl", copy.folder.parent / "data.jsonl")
    with pytest.raises(UserError, match=r"data\.train is 'data\.jsonl' there and "):
        copy(f"data.train={copy.folder.parent / 'data.jsonl'}")


def test_what_helps_against_too_little_memory_may_change_on_purpose(copy):
    with pytest.raises(
        UserError, match=r"model\.execution\.remat is 'none' there and 'full' here; .*--allow-change"
    ):
        copy("model.execution.remat=full")
    assert copy("model.execution.remat=full", allow_change=True).step == 3
    assert changes(copy.folder) == [("model.execution.remat", 3, "none", "full")]


def test_texts_that_are_no_files_are_compared_as_they_are():
    there, here = {"data": {"separator": "/", "train": "."}}, {"data": {"separator": "//", "train": "./"}}
    assert [change.name for change in differences(there, here)] == ["data.separator", "data.train"]


REWARD = """
WORDS = ["a", "b"]

def mine(prompts, responses):
    return [float(sum(word in response for word in WORDS)) for response in responses]
"""


def test_another_body_of_a_reward_and_another_file_that_it_reads_are_told(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    module, corpus = tmp_path / "identity_rewards.py", tmp_path / "corpus.txt"
    module.write_text(REWARD)
    corpus.write_text("one two three two one\n" * 3)
    parts = {
        "mine": {"reward": "identity_rewards:mine"},
        "language": {"reward": {"name": "ngram_fluency", "path": str(corpus)}},
    }
    settings = [
        f"run_dir={tmp_path / 'run'}",
        f"phases.ppo.reward.parts={json.dumps(parts)}",
        "scheduler={name: alternation, cycle: {sft: 1, ppo: 0}, warmup: {ppo: 0}}",
    ]
    made_of = build(load_config(tiny / "config.yaml", settings)).made_of
    names = ["phases.ppo.reward.parts.language.reward.path", "phases.ppo.reward.parts.mine.reward"]
    assert sorted(name for name in made_of if name.startswith("phases.")) == names
    again = build(load_config(tiny / "config.yaml", settings)).made_of
    assert again == made_of
    monkeypatch.delitem(sys.modules, "identity_rewards")
    module.write_text(REWARD.replace('"b"]', '"c"]'))
    corpus.write_text("one two\n" * 3)
    after = build(load_config(tiny / "config.yaml", settings)).made_of
    assert sorted(name for name in made_of if made_of[name] != after[name]) == names


@pytest.mark.slow
def test_another_lambda_is_told(tiny, tmp_path, caplog):
    def trainer(reward):
        only_sft = {"name": "alternation", "cycle": {"sft": 1}}
        return HybridTrainer(
            tiny / "config.yaml", reward=reward, run_dir=tmp_path, steps=1, scheduler=only_sft, checkpoint={}
        )

    trainer(lambda prompts, responses: [0.0 for _ in responses]).train()
    caplog.clear()
    open_again(trainer(lambda prompts, responses: [0.0 for _ in responses]).experiment)
    assert warnings(caplog) == []
    open_again(trainer(lambda prompts, responses: [1.0 for _ in responses]).experiment)
    (told,) = warnings(caplog)
    assert told.startswith("the run goes on at step 1 with other contents under the same settings: ")
    assert "phases.ppo.reward.parts.reward.reward (" in told


def test_another_tokenizer_in_the_run_directory_is_an_error(copy, tmp_path):
    path = copy.folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))
    with pytest.raises(
        UserError, match=r"not the one that the run was trained with \(tokenizer\.chat_template "
    ):
        copy()


def test_a_checkpoint_of_version_0_4_goes_on_with_a_note(copy, monkeypatch, caplog):
    monkeypatch.setattr("hybrid_jax.runs.origin._note", lambda folder, step: {})
    assert copy().step == 3
    assert warnings(caplog) == []
    assert "checkpoint 3 is from before version 0.4.1 and holds no checksums" in caplog.text


def test_a_longer_or_shorter_run_says_how_its_learning_rate_changes(copy, caplog):
    assert copy("steps=3").step == 3
    assert warnings(caplog) == []
    copy("steps=9")
    copy("steps=2")
    assert warnings(caplog) == [
        # After 2 of 5 and of 2 steps: 1e-3 (1 - 2/5) and 0.
        "the learning rate of sft goes on at 0.0006, not 0: its schedule now ends after 5 of its steps "
        "instead of 2 (by steps or scheduler)",
        # The one step of PPO that is taken: 1e-5 (1 - 1/4) and 0.
        "the learning rate of ppo goes on at 7.5e-06, not 0: its schedule now ends after 4 of its steps "
        "instead of 1 (by steps or scheduler)",
        "3 steps are taken already, so steps=2 trains no more",
    ]


def test_settings_of_optimizers_and_rewards_change_on_purpose_and_are_kept(copy, tiny, tmp_path, caplog):
    start = (f"{RATE}=1e-4", "phases.ppo.reward.parts.length.weight=2", "phases.ppo.epochs=2")
    with pytest.raises(
        UserError,
        match=rf"holds a run of another config: {RATE} is 0\.001 there and 0\.0001 here; give another run_dir, "
        r"or undo the change to resume, or go on with it by --allow-change \(in Python allow_change=True\)",
    ):
        copy(*start)
    assert copy(*start, allow_change=True).step == 3
    expected = [
        ("phases.ppo.epochs", 3, 1, 2),
        ("phases.ppo.reward.parts.length.weight", 3, 1.0, 2.0),
        (RATE, 3, 1e-3, 1e-4),
    ]
    assert sorted(changes(copy.folder)) == expected
    assert f"from step 3 on {RATE} is 0.0001, not 0.001" in caplog.text
    copy(*start)  # from now on they are the run's own
    assert sorted(changes(copy.folder)) == expected
    copy(allow_change=True)
    assert changes(copy.folder)[-1][1:] in [(3, 2.0, 1.0), (3, 1e-4, 1e-3), (3, 2, 1)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.width=24",
            "model.width is 16 there and 24 here, which cannot change: it decides what the weights are",
        ),
        (
            "tokenizer={name: bpe}",
            "tokenizer.name is 'bytes' there and 'bpe' here, which cannot change: the weights ",
        ),
        (
            "seed=1",
            "seed is 0 there and 1 here, which cannot change: the untrained weights, the order of the rows ",
        ),
        (
            "phases.sft.optimizer.name=lion",
            "which cannot change: another optimizer cannot go on with its state",
        ),
        ("phases.sft.optimizer.state_dtype=bfloat16", "which cannot change: another optimizer cannot go on"),
        ("phases.more={name: sft}", "phases.more is None there and {'name': 'sft', "),
    ],
)
def test_what_a_run_cannot_go_on_with_is_refused_with_the_reason_even_on_purpose(copy, override, message):
    for allow_change in (True, False):
        with pytest.raises(UserError) as refused:
            copy(override, allow_change=allow_change)
        assert message in str(refused.value)
        assert "allow" not in str(refused.value)


def test_a_change_that_needs_another_state_is_refused_when_the_checkpoint_is_read(copy):
    with pytest.raises(UserError) as refused:
        copy("phases.ppo.reward.parts.length.normalise=true", allow_change=True)
    assert str(refused.value).startswith(
        "these settings need another state than checkpoint 3 holds: host.ppo/reward"
    )
    assert str(refused.value).endswith(
        " is nothing there and float64[] here; undo the change, or give another run_dir"
    )


def test_the_train_command_goes_on_with_a_change_on_purpose(copy, tiny, command):
    start = ("--config", tiny / "config.yaml", f"run_dir={copy.folder}", "steps=4", f"{RATE}=1e-4")
    assert command(train.main, *start)[0] == 2
    code, _, err = command(train.main, *start, "--allow-change")
    assert code == 0, err
    assert (
        yaml.safe_load((copy.folder / "config.yaml").read_text())["phases"]["sft"]["optimizer"]["learning_rate"]
        == 1e-4
    )
    assert changes(copy.folder) == [(RATE, 3, 1e-3, 1e-4)]
    evaluations = [r["step"] for r in read_records(copy.folder / "metrics.jsonl") if r["phase"] == "evaluation"]
    assert evaluations == [0, 1, 3, 4]


@pytest.mark.slow
def test_a_branch_goes_on_from_a_kept_checkpoint_of_another_run_and_needs_it_no_more(
    run_dir, tiny, tmp_path, command, caplog
):
    caplog.set_level(logging.INFO, "hybrid_jax")
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    shutil.copytree(run_dir, parent)
    settings = [f"run_dir={branch}", f"start_from={parent}@2", "seed=5", f"{RATE}=1e-4", "steps=4"]
    state = open_again(build(load_config(tiny / "config.yaml", settings)))
    saved = checkpoint.Checkpoints(parent / "checkpoints", 2).newest(
        build(load_config(tiny / "config.yaml", [f"run_dir={parent}"])).init(), None, 2
    )
    assert state.step == 2
    assert state.schedule == saved.schedule
    assert state.cursors == saved.cursors
    jax.tree.map(np.testing.assert_array_equal, state.train, saved.train)
    assert changes(branch) == [
        ("start_from", 2, None, f"{parent}@2"),
        (RATE, 2, 1e-3, 1e-4),
        ("seed", 2, 0, 5),
    ]
    shutil.rmtree(parent)
    code, _, err = command(train.main, "--config", tiny / "config.yaml", *settings)
    assert code == 0, err
    steps = [(r["step"], r["phase"]) for r in read_records(branch / "metrics.jsonl")]
    assert steps == [(2, "evaluation"), (2, "sft"), (3, "ppo"), (4, "evaluation")]


def test_a_branch_of_a_run_without_a_step_is_pinned_to_its_newest_one(run_dir, tiny, tmp_path):
    settings = [f"run_dir={tmp_path}", f"start_from={run_dir}"]
    experiment = build(load_config(tiny / "config.yaml", settings))
    assert experiment.config.start_from == f"{run_dir}@3"
    open_again(experiment)
    assert build(load_config(tiny / "config.yaml", settings)).config.start_from == f"{run_dir}@3"
    with pytest.raises(
        UserError, match=r"start_from is .*@3' there and None here, which cannot change: the run has b"
    ):
        build(load_config(tiny / "config.yaml", settings[:1]))


@pytest.mark.parametrize(
    ("start_from", "message"),
    [
        ("{run}@7", "start_from: {run} keeps no checkpoint of step 7; those that it keeps: 2, 3"),
        ("nowhere@7", "start_from must be a run with a checkpoint, or RUN@step, got 'nowhere@7'"),
        ("nowhere", "start_from must be a run with a checkpoint, or RUN@step, got 'nowhere'"),
    ],
)
def test_a_branch_from_what_is_not_kept_is_one_line(run_dir, tiny, tmp_path, command, start_from, message):
    start = ("--config", tiny / "config.yaml", f"run_dir={tmp_path / 'new'}")
    code, _, err = command(train.main, *start, f"start_from={start_from.format(run=run_dir)}")
    assert (code, err) == (2, f"error: {message.format(run=run_dir)}\n")
    assert not (tmp_path / "new").exists()


def test_a_branch_with_another_model_is_refused_with_the_reason(run_dir, tiny, tmp_path, command):
    start = ("--config", tiny / "config.yaml", f"run_dir={tmp_path}", f"start_from={run_dir}", "model.width=24")
    code, _, err = command(train.main, *start)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(
        f"error: start_from: model.width is 16 in {run_dir} and 24 here, which cannot change: it decides"
    )
