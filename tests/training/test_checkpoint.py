import concurrent.futures
import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.training import checkpoint, saving_noise
from hybrid_jax.training.checkpoint import CheckpointConfig, Checkpoints, SaveError, newest_policy
from hybrid_jax.training.checkpoint_note import check_structure
from hybrid_jax.training.state import RunState, ScheduleState, TrainState


def state_at(step, size=2000):
    """A state of every kind of leaf, different at each step; noise, so that compression cannot shrink it."""
    noise = np.random.default_rng(step).normal(size=size).astype(np.float32)
    policy = {"w": jnp.asarray(noise), "half": jnp.asarray(noise[:7], jnp.bfloat16)}
    train = TrainState(
        params={"model": policy, "ppo/value": {"head": jnp.full((3,), step / 3)}},
        opt_state={"sft": {"model": {"count": jnp.asarray(step), "mu": jnp.asarray(noise[::-1])}}},
        extra={"ppo/kl_control": jnp.asarray(0.1 + step, jnp.float32)},
    )
    moments = {"count": np.asarray(1.0 * step), "mean": np.asarray(1 / 3), "M2": np.asarray(1e-300)}
    return RunState(
        step=step,
        train=train,
        references={"start": jax.tree.map(jnp.copy, policy)},
        schedule=ScheduleState(steps={"sft": step}, entries={"sft": 1}, last="sft", credit=0.1 + 0.2),
        cursors={"sft": 4 * step, "ppo/examples": 2**40},
        host={"ppo/reward": {"length": moments}},
    )


def bits(state):
    """A state as plain Python: equal only if every bit is."""
    arrays = {"train": state.train, "references": dict(state.references), "host": dict(state.host)}
    leaves = [
        (jax.tree_util.keystr(path), str(np.asarray(leaf).dtype), np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    ]
    return leaves, state.step, dataclasses.asdict(state.schedule), dict(state.cursors)


def save(folder, *states, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for state in states:
        checkpoints.save(state)
    checkpoints.close()


def save_and_close(checkpoints, state):
    try:
        checkpoints.save(state)
    finally:
        checkpoints.close()


def newest(folder):
    return Checkpoints(folder, 2).newest(state_at(0))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    save(folder, state_at(3), state_at(6))
    return folder


@pytest.fixture
def saved(original, tmp_path):
    """A folder with the checkpoints 3 and 6."""
    return shutil.copytree(original, tmp_path / "checkpoints")


def test_a_checkpoint_gives_back_every_bit_and_type(saved):
    restored = newest(saved)
    assert bits(restored) == bits(state_at(6))
    assert isinstance(restored.host["ppo/reward"]["length"]["mean"], np.ndarray)
    assert restored.host["ppo/reward"]["length"]["M2"] == 1e-300  # no float32 holds this
    assert restored.train.params["model"]["half"].dtype == ml_dtypes.bfloat16


def test_a_reference_that_a_fresh_run_has_not_frozen_yet_is_restored(saved):
    fresh = dataclasses.replace(state_at(0), references={})
    assert bits(Checkpoints(saved, 2).newest(fresh)) == bits(state_at(6))


def test_the_next_step_may_consume_the_state_at_once(tmp_path):
    state = state_at(3, size=200_000)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state)
    overwritten = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0, x), donate_argnums=0)(state.train)
    jax.block_until_ready(overwritten)
    checkpoints.close()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.train))
    assert bits(Checkpoints(tmp_path, 2).newest(state_at(0, 200_000))) == bits(state_at(3, 200_000))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    save(tmp_path, *(state_at(step) for step in (1, 2, 3, 4)), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def largest(folder):
    """The file that holds the arrays' data."""
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "a data file deleted": lambda folder: largest(folder).unlink(),
    "a data file truncated": lambda folder: truncate(largest(folder)),
    "a byte of the data flipped": lambda folder: flip_a_byte(largest(folder)),
    "a byte of the index flipped": lambda folder: flip_a_byte(folder / "state" / "manifest.ocdbt"),
    "the index deleted": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
    "the shapes truncated": lambda folder: truncate(folder / "state" / "_METADATA"),
    "the metadata deleted": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "the metadata truncated": lambda folder: truncate(folder / "_CHECKPOINT_METADATA"),
    "the seal truncated": lambda folder: truncate(folder / checkpoint.SEAL),
    "the state deleted": lambda folder: shutil.rmtree(folder / "state"),
    "nothing left": empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_in_one_line_and_written_again(saved, damage, caplog, capfd):
    DAMAGES[damage](saved / "6")
    checkpoints = Checkpoints(saved, 2)
    assert bits(checkpoints.newest(state_at(0))) == bits(state_at(3))
    assert [record.message[:24] for record in caplog.records] == ["checkpoint 6 is damaged "]
    assert "\n" not in caplog.messages[0]
    checkpoints.save(state_at(6))
    checkpoints.close()
    caplog.clear()
    assert bits(newest(saved)) == bits(state_at(6))
    assert not caplog.records
    assert sorted(path.name for path in saved.iterdir()) == ["3", "6"]
    assert "Traceback" not in capfd.readouterr().err


def test_an_array_that_is_not_what_was_saved_is_found_also_without_a_seal(saved, caplog):
    (saved / "6" / checkpoint.SEAL).unlink()
    assert newest(saved).step == 6  # a kill between the last file and the seal loses nothing
    path = saved / "6" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    metadata["custom_metadata"]["sums"]["['train'].params['model']['w']"] ^= 1
    path.write_text(json.dumps(metadata))
    assert newest(saved).step == 3
    assert "checksum of ['train'].params['model']['w'] differs" in caplog.messages[-1]


def test_where_every_checkpoint_is_damaged_the_user_is_told_and_nothing_is_deleted(saved):
    for step in ("3", "6"):
        flip_a_byte(largest(saved / step))
    with pytest.raises(UserError, match=r"none of the checkpoints \[6, 3\] in .* can be read; move"):
        newest(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["3", "6"]


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(saved):
    flip_a_byte(largest(saved / "6"))
    checkpoints = Checkpoints(saved, keep=2)
    assert checkpoints.newest(state_at(0)).step == 3
    checkpoints.save(state_at(4))
    checkpoints.close()
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4"]
    assert newest(saved).step == 4


def test_where_nothing_was_saved_there_is_nothing_to_load_and_nothing_is_made(tmp_path):
    assert newest(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert newest(tmp_path) is None


def test_reading_leaves_alone_what_a_running_run_is_writing_and_the_next_run_cleans_up(saved):
    half_written = saved / "9.orbax-checkpoint-tmp"
    (half_written / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    policy = jax.eval_shape(lambda: state_at(0).train.params["model"])
    assert newest(saved).step == 6
    assert newest_policy(saved, policy)[0] == 6
    assert half_written.exists()
    save(saved, state_at(9))
    assert sorted(path.name for path in saved.iterdir()) == ["6", "9"]


def test_a_state_of_an_older_version_is_refused_in_one_line_that_says_what_to_do():
    shapes = {"['train'].params['model']['x']": [1], "['train'].params['value']['head']['bias']": [1]}
    with pytest.raises(
        UserError, match=r"checkpoint 8 is from before version 0\.5.*: export the model, and begin"
    ):
        check_structure({"train": {}}, {"step": 8, "shapes": shapes})


def test_the_policy_alone_is_read_and_falls_back_too(saved):
    policy = jax.eval_shape(lambda: state_at(0).train.params["model"])
    flip_a_byte(largest(saved / "6"))
    step, params = newest_policy(saved, policy)
    assert step == 3
    assert np.asarray(params["w"]).tobytes() == np.asarray(state_at(3).train.params["model"]["w"]).tobytes()
    assert (saved / "6").exists()  # a reader deletes nothing


def test_a_full_disk_is_one_clear_line_and_keeps_what_was_there(small_disk, capfd):
    folder = small_disk / "checkpoints"
    checkpoints = Checkpoints(folder, 3)
    checkpoints.save(state_at(1, 20_000))
    checkpoints.wait()
    (small_disk / "filler").write_bytes(bytes(2**21 - 500_000))
    with pytest.raises(SaveError, match=r"^checkpoint 2 cannot be written: no space left on the disk; .*rerun"):
        save_and_close(checkpoints, state_at(2, 200_000))
    assert "Traceback" not in capfd.readouterr().err
    assert Checkpoints(folder, 3).newest(state_at(0, 20_000)).step == 1
    (small_disk / "filler").unlink()
    save(folder, state_at(2, 20_000), keep=3)
    assert bits(Checkpoints(folder, 3).newest(state_at(0, 20_000))) == bits(state_at(2, 20_000))


@pytest.mark.parametrize("ending", ["save", "wait", "close"])
def test_an_error_of_the_background_thread_is_raised_by_what_comes_next(tmp_path, monkeypatch, ending):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_seal", fail)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state_at(1))
    with pytest.raises(SaveError, match="checkpoint 1 cannot be written: no space left on the disk"):
        checkpoints.save(state_at(2)) if ending == "save" else getattr(checkpoints, ending)()
    checkpoints.close()  # said once


def test_other_errors_of_the_file_system_say_what_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"checkpoint 1 cannot be written: .*file"):
        save(tmp_path / "file" / "checkpoints", state_at(1))


def split_over_devices(step):
    """A state on four devices, its largest parameter a quarter on each."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = state_at(step)
    train = jax.device_put(state.train, everywhere)
    w = jax.device_put(train.params["model"]["w"], rows)
    params = {**train.params, "model": {**train.params["model"], "w": w}}
    return dataclasses.replace(state, train=train.replace(params=params))


def test_a_state_split_over_devices_comes_back_where_it_was(tmp_path):
    save(tmp_path, split_over_devices(5))
    like = split_over_devices(0)
    restored = newest_of(tmp_path, like)
    assert bits(restored) == bits(state_at(5))
    for group, name in (("model", "w"), ("ppo/value", "head")):
        leaf, expected = (state.train.params[group][name] for state in (restored, like))
        assert leaf.sharding.is_equivalent_to(expected.sharding, 1)


@pytest.mark.parametrize("lost", ["deleted", "truncated"])
def test_a_lost_shard_of_a_split_state_falls_back_to_the_checkpoint_before(tmp_path, lost, caplog):
    save(tmp_path, split_over_devices(5), split_over_devices(7))
    largest(tmp_path / "7").unlink() if lost == "deleted" else truncate(largest(tmp_path / "7"))
    assert bits(newest_of(tmp_path, split_over_devices(0))) == bits(state_at(5))
    assert "checkpoint 7 is damaged" in caplog.messages[0]


def newest_of(folder, fresh):
    return Checkpoints(folder, 2).newest(fresh)


def test_orbax_does_not_narrate(saved, caplog):
    with caplog.at_level(logging.INFO):
        save(saved, state_at(9))
    assert not [record for record in caplog.records if record.name == "absl"]


@pytest.mark.parametrize("setting", ["every", "keep", "export_every"])
def test_settings_must_be_positive(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        CheckpointConfig(**{setting: 0})


def test_a_failed_save_is_known_before_the_next_one_and_one_under_way_is_not_waited_for(tmp_path, monkeypatch):
    let_go = threading.Event()

    def fail(folder):
        let_go.wait(60)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_seal", fail)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state_at(1))
    checkpoints.check()
    let_go.set()
    concurrent.futures.wait([checkpoints._pending[1]])
    with pytest.raises(SaveError, match="checkpoint 1 cannot be written: no space left on the disk"):
        checkpoints.check()
    checkpoints.check()  # said once
    checkpoints.close()


def test_a_write_that_ends_late_prints_no_traceback_and_other_errors_are_still_heard(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    saving_noise.silence()
    saving_noise.silence()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore
    assert [str(unraisable.exc_value) for unraisable in heard] == ["another"]


def test_a_process_whose_save_failed_ends_at_once(tmp_path):
    """Orbax would wait five minutes for a folder that a thread of its own could not make."""
    script = """
import sys
from pathlib import Path
from types import SimpleNamespace
from test_checkpoint import Checkpoints, SaveError, state_at
disk = Path(sys.argv[1])
checkpoints = Checkpoints(disk / "checkpoints", 2)
checkpoints.save(state_at(1))
checkpoints.wait()
(disk / "checkpoints").rename(disk / "moved")
(disk / "checkpoints").write_text("no folder any more")
try:
    checkpoints.save(state_at(2))
    checkpoints.wait()
except SaveError as error:
    print(error)
checkpoints.close()
"""
    folder, environment = str(Path(__file__).parent), {**os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0
    assert result.stdout.startswith("checkpoint 2 cannot be written: [Errno 20] Not a directory")
    assert result.stderr == ""
