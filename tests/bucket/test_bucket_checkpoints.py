"""Checkpoints in a bucket, which renames nothing: what is whole, what is torn, what is removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.runs.files import run_files
from hybrid_jax.training.checkpoint import Checkpoints, SaveError, newest_policy, saved_steps
from hybrid_jax.training.state import RunState, ScheduleState, TrainState

RUN = "gs://bucket/runs/one"


def state_at(step):
    policy = {"w": jnp.arange(2000.0) + step}
    train = TrainState(params={"model": policy}, opt_state={}, extra={})
    schedule = ScheduleState(steps={"sft": step}, entries={"sft": 1}, last="sft", credit=0.0)
    return RunState(step=step, train=train, references={}, schedule=schedule, cursors={"sft": step}, host={})


@pytest.fixture
def saved(bucket):
    """Checkpoints 1, 2 and 3 of which two are kept."""
    before = []
    checkpoints = Checkpoints(run_files(RUN).checkpoints, 2, before=lambda: before.append(bucket.names()))
    for step in (1, 2, 3):
        checkpoints.save(state_at(step))
    checkpoints.close()
    assert before[0] == []
    assert "runs/one/checkpoints/1/commit_success.txt" in before[1]
    return bucket


def save(checkpoints, step):
    checkpoints.save(state_at(step))
    checkpoints.wait()


def newest():
    checkpoints = Checkpoints(run_files(RUN).checkpoints, 2)
    return checkpoints, checkpoints.newest(state_at(0))


def test_the_newest_ones_are_kept_and_read_without_files_of_ours_beside_them(saved):
    assert saved_steps(run_files(RUN).checkpoints) == [3, 2]
    assert not saved.names("runs/one/checkpoints/1/")
    assert not [name for name in saved.names() if name.endswith("files.json")]
    state = newest()[1]
    assert (state.step, state.cursors) == (3, {"sft": 3})
    np.testing.assert_array_equal(state.train.params["model"]["w"], np.arange(2000) + 3)
    step, policy = newest_policy(run_files(RUN).checkpoints, jax.eval_shape(lambda: state_at(0).policy))
    assert (step, float(policy["w"][0])) == (3, 3.0)


def test_one_that_was_not_finished_does_not_count_and_is_written_again(saved):
    del saved.objects["runs/one/checkpoints/3/commit_success.txt"]
    checkpoints, state = newest()
    assert (saved_steps(run_files(RUN).checkpoints), state.step) == ([2], 2)
    checkpoints.save(state_at(3))
    checkpoints.close()
    assert newest()[1].step == 3


def test_the_first_one_unfinished_is_as_none(bucket):
    bucket.put("runs/one/checkpoints/2/_CHECKPOINT_METADATA", b"{}")
    assert saved_steps(run_files(RUN).checkpoints) == []
    assert newest()[1] is None


def test_a_damaged_one_is_passed_over_and_gone_with_the_next_save(saved, caplog):
    data = max(saved.names("runs/one/checkpoints/3/state/"), key=lambda name: len(saved[name]))
    torn = bytearray(saved[data])
    torn[len(torn) // 2 :] = bytes(len(torn) - len(torn) // 2)
    saved.put(data, bytes(torn))
    checkpoints, state = newest()
    assert state.step == 2
    assert "checkpoint 3 is damaged" in caplog.text
    checkpoints.save(state_at(4))
    checkpoints.close()
    assert saved_steps(run_files(RUN).checkpoints) == [4, 2]


def test_a_save_that_the_bucket_refuses_is_one_line(saved):
    checkpoints, _ = newest()
    saved.refusal = (403, "no storage.objects.create access")
    with pytest.raises(SaveError, match="checkpoint 4 cannot be written: ") as caught:
        save(checkpoints, 4)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    checkpoints.close()
