"""The lock of a run in a bucket, where only the condition on a write tells who was first."""

import json
import logging
import os
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.runs import lock as lock_module
from hybrid_jax.runs.bucket import BucketLockFile
from hybrid_jax.runs.files import fetched, run_files

RUN = "gs://bucket/runs/one"
LOCK = "runs/one/lock.json"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "GONE_SECONDS", 0.3)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "_LOOK_SECONDS", 0.02)


def held_elsewhere(bucket, host="tpu-2", **changes):
    with run_files(RUN).owned():
        lock = json.loads(bucket[LOCK])
    bucket.put(LOCK, json.dumps({**lock, "mark": "theirs", "host": host, "pid": 4711, **changes}).encode())


def test_of_two_writes_over_one_version_the_second_is_refused(bucket):
    files = [BucketLockFile(f"{RUN}/lock.json") for _ in range(2)]
    assert [file.read() for file in files] == [None, None]
    first = files[0].swap(None, "first")
    assert files[1].swap(None, "second") is None
    assert files[1].read() == ("first", first)
    second = files[1].swap(first, "second")
    assert files[0].swap(first, "third") is None
    files[0].remove(first)
    assert files[0].read() == ("second", second)
    files[1].remove(second)
    files[1].remove(second)
    assert bucket.names() == []


def test_the_lock_lies_in_the_bucket_while_it_is_held_and_is_no_file_of_the_run(bucket, other_machine):
    with run_files(RUN).owned():
        assert bucket.names() == [LOCK]
        other_machine()
        assert not list(fetched(RUN).folder.iterdir())
    assert bucket.names() == []


@pytest.mark.usefixtures("quick")
def test_a_lock_of_another_machine_is_taken_over_when_nobody_renews_it(bucket, caplog):
    held_elsewhere(bucket)
    started = time.monotonic()
    with caplog.at_level(logging.INFO), run_files(RUN).owned():
        assert json.loads(bucket[LOCK])["host"] != "tpu-2"
    assert time.monotonic() - started >= 0.3
    assert f"took over run_dir {RUN} from process 4711 on tpu-2" in caplog.text
    assert LOCK not in bucket


@pytest.mark.usefixtures("quick")
def test_a_trainer_renews_its_lock_and_ends_when_another_machine_has_it(bucket):
    files = run_files(RUN)
    with files.owned():
        deadline = time.monotonic() + 5
        while not json.loads(bucket[LOCK])["beat"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(bucket[LOCK])["beat"] >= 1
        bucket.put(LOCK, b'{"host": "tpu-2"}')
        while not lock_module._locks[RUN].is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        (files.folder / "metrics.jsonl").write_text("1\n")
        with pytest.raises(UserError, match=f"run_dir {RUN} was moved or removed while"):
            files.upload()
    assert bucket.names() == [LOCK]


def test_a_lock_of_a_living_process_of_this_machine_is_refused_at_once(bucket):
    held_elsewhere(bucket, lock_module.socket.gethostname())
    lock = json.loads(bucket[LOCK])
    parent = os.getppid()
    lock |= {"pid": parent, "started": lock_module._started(parent)}
    bucket.put(LOCK, json.dumps(lock).encode())
    with pytest.raises(UserError, match=f"run_dir {RUN} is being trained by process {parent} on "):
        run_files(RUN).owned().__enter__()


def test_a_bucket_that_refuses_the_lock_is_one_line_with_what_to_do(bucket):
    bucket.refusal = (403, "no storage.objects.create access")
    with pytest.raises(UserError, match=r"cannot be locked: .*; give this machine's account the roles"):
        run_files(RUN).owned().__enter__()
