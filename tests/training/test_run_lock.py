"""Who may train in a run directory, also after a kill, on another host, and at the very same moment."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.runs import lock as lock_module
from hybrid_jax.runs.files import run_files
from hybrid_jax.runs.lock import DiskLockFile, Holder, check_owned, owned

HOLD = """
import sys, time
from pathlib import Path
from hybrid_jax.runs.lock import DiskLockFile, owned
with owned(DiskLockFile(Path(sys.argv[1])), "theirs"):
    print("taken", flush=True)
    time.sleep(60)
"""
COUNT = """
import sys, time
from pathlib import Path
from hybrid_jax.core.errors import UserError
from hybrid_jax.runs import lock as lock_module
from hybrid_jax.runs.lock import DiskLockFile, owned
folder, left = Path(sys.argv[1]), 10
while left:
    try:
        with owned(DiskLockFile(folder / "run"), "one"):
            count = int((folder / "count").read_text())
            time.sleep(0.002)
            (folder / "count").write_text(str(count + 1))
            left -= 1
    except UserError as error:
        assert "is being trained by process" in str(error), error
        time.sleep(0.001)
"""


@pytest.fixture
def quick(monkeypatch):
    """A minute of waiting as a third of a second."""
    monkeypatch.setattr(lock_module, "GONE_SECONDS", 0.3)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lock_module, "_STUCK_SECONDS", 0.1)


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def take(folder):
    return owned(DiskLockFile(folder), str(folder))


def lock_of(folder):
    return json.loads((folder / "lock.json").read_text())


def write_lock(folder, **changes):
    """A lock as another trainer would have left it."""
    folder.mkdir(exist_ok=True)
    with owned(DiskLockFile(folder), "template"):
        text = lock_of(folder)
    folder.mkdir(exist_ok=True)
    (folder / "lock.json").write_text(json.dumps({**text, "mark": "theirs", **changes}))


def test_the_lock_names_its_process_and_goes_with_the_folders_that_it_made(tmp_path):
    with take(tmp_path / "runs" / "one"):
        lock = lock_of(tmp_path / "runs" / "one")
        assert lock["pid"] == os.getpid()
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+", lock["since"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_however_a_training_ends_the_lock_goes_and_what_was_written_stays(tmp_path, error):
    def train():
        with take(tmp_path / "run"):
            (tmp_path / "run" / "metrics.jsonl").write_text("1\n")
            raise error

    with pytest.raises(error):
        train()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_second_trainer_is_told_who_trains_there_since_when_and_what_to_do(tmp_path, other_process):
    before = lock_of(tmp_path / "run")
    with pytest.raises(UserError) as refused, take(tmp_path / "run"):
        pass
    who = f"process {other_process.pid} on {before['host']} since {before['since']}"
    assert str(refused.value) == (
        f"run_dir {tmp_path / 'run'} is being trained by {who}: wait for its end, "
        f"stop it (kill {other_process.pid}), or give another run_dir"
    )
    assert lock_of(tmp_path / "run") == before


def test_the_lock_of_a_killed_process_is_taken_over_at_once_though_its_parent_has_not_noticed(
    tmp_path, other_process, caplog
):
    other_process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the list of processes
    started = time.monotonic()
    with caplog.at_level(logging.INFO), take(tmp_path / "run"):
        assert lock_of(tmp_path / "run")["pid"] == os.getpid()
    assert time.monotonic() - started < 1.0
    assert "took over run_dir" in caplog.text
    assert f"from process {other_process.pid} on " in caplog.text


def test_a_younger_process_of_the_same_number_does_not_keep_the_lock(tmp_path):
    write_lock(tmp_path / "run", pid=os.getppid(), started="1")
    with take(tmp_path / "run"):
        assert lock_of(tmp_path / "run")["pid"] == os.getpid()
    write_lock(tmp_path / "run", pid=os.getppid(), started=lock_module._started(os.getppid()))
    with pytest.raises(UserError, match=f"is being trained by process {os.getppid()} "), take(tmp_path / "run"):
        pass


class Deaf(DiskLockFile):
    """One whose answers are lost, as those of a bucket may be: the client asks again and hears a refusal."""

    def swap(self, version, text):
        super().swap(version, text)


@pytest.mark.usefixtures("quick")
def test_a_lock_is_kept_though_the_answers_to_its_writes_are_lost(tmp_path):
    with owned(Deaf(tmp_path / "run"), "mine"):
        time.sleep(0.1)
        assert lock_of(tmp_path / "run")["beat"] >= 2
        check_owned("mine")
    assert not (tmp_path / "run").exists()


def test_without_proc_the_start_of_a_process_is_the_same_in_every_time_zone_and_language(monkeypatch):
    if shutil.which("ps") is None:
        pytest.skip("no ps")
    monkeypatch.setattr(lock_module.Path, "exists", lambda path: False)
    told = set()
    for zone in ("UTC", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        told.add(lock_module._started(os.getpid()))
    assert len(told) == 1
    assert re.search(r"\d\d:\d\d:\d\d \d{4}$", told.pop())


def test_a_process_of_another_user_that_the_system_hides_keeps_its_lock(tmp_path, monkeypatch):
    def not_yours(pid, number):
        raise PermissionError

    write_lock(tmp_path / "run", pid=2**22 + 1, started="5")  # no number of a process: /proc says nothing
    monkeypatch.setattr(os, "kill", not_yours)
    with pytest.raises(UserError, match=f"is being trained by process {2**22 + 1} "), take(tmp_path / "run"):
        pass


@pytest.mark.usefixtures("quick")
def test_where_no_start_of_a_process_can_be_told_a_lock_is_watched(tmp_path):
    write_lock(tmp_path / "run", pid=os.getppid(), started="")
    started = time.monotonic()
    with take(tmp_path / "run"):
        assert lock_of(tmp_path / "run")["pid"] == os.getpid()
    assert time.monotonic() - started >= 0.3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", [{"host": "tpu-2"}, {"system": "another container"}])
def test_on_another_host_a_lock_that_is_renewed_is_kept(tmp_path, where):
    write_lock(tmp_path / "run", pid=4711, **where)
    end = threading.Event()

    def renew():
        file, beat = DiskLockFile(tmp_path / "run"), 0
        while not end.wait(0.02):
            beat += 1
            held = Holder(**lock_of(tmp_path / "run"))
            file.swap(file.read()[1], json.dumps(dataclasses.asdict(dataclasses.replace(held, beat=beat))))

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(UserError, match=r"by process 4711 on .*: wait for its end, stop it there, or give"):
        take(tmp_path / "run").__enter__()
    end.set()
    thread.join()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", [None, "", "{}"])
def test_on_another_host_a_lock_that_nobody_renews_is_taken_over_after_a_while(tmp_path, caplog, text):
    write_lock(tmp_path / "run", host="tpu-2", pid=4711)
    if text is not None:  # damaged by a power cut
        (tmp_path / "run" / "lock.json").write_text(text)
    started = time.monotonic()
    with caplog.at_level(logging.INFO), take(tmp_path / "run"):
        assert 0.3 <= time.monotonic() - started < 2.0
        assert lock_of(tmp_path / "run")["pid"] == os.getpid()
    whose = "process 4711 on tpu-2" if text is None else "process 0 on an unknown host"
    assert f"is locked by {whose} since " in caplog.messages[0]
    assert caplog.messages[0].endswith("; waiting up to 0 s to see whether it is still there")


def test_on_another_host_a_lock_that_is_removed_is_taken_without_waiting_to_the_end(tmp_path):
    write_lock(tmp_path / "run", host="tpu-2", pid=4711)
    threading.Timer(0.1, (tmp_path / "run" / "lock.json").unlink).start()
    started = time.monotonic()
    with take(tmp_path / "run"):
        assert time.monotonic() - started < 5.0


def test_the_same_thread_may_lock_again_within_and_another_thread_is_refused(tmp_path):
    refusals = []

    def other():
        try:
            with take(tmp_path / "run"):
                pass
        except UserError as error:
            refusals.append(str(error))

    with take(tmp_path / "run"):
        with take(tmp_path / "run"):
            pass
        assert lock_of(tmp_path / "run")["pid"] == os.getpid()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refusals) == 1
    assert f"is being trained by process {os.getpid()} on " in refusals[0]


def test_another_spelling_of_the_directory_is_the_same_directory(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with run_files(tmp_path / "run").owned():
        for other in ("run", "./run/../run", "link"):
            with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} "):
                run_files(other).owned().__enter__()


def test_of_processes_that_take_it_at_the_same_moment_only_one_has_it(tmp_path):
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [("", 0)] * 4
    assert (tmp_path / "count").read_text() == "40"


@pytest.mark.usefixtures("quick")
def test_a_change_that_a_kill_interrupted_does_not_block_the_next_one(tmp_path):
    (tmp_path / "lock.json.busy").touch()
    with take(tmp_path):
        assert lock_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_a_trainer_that_stood_still_and_was_replaced_writes_nothing_more(tmp_path):
    files = run_files(tmp_path / "run")
    with files.owned():
        logger = files.open(files.folder, {}, None)
        logger.metrics({"step": 0})
        write_lock_of_another = json.dumps({**lock_of(tmp_path / "run"), "mark": "theirs", "host": "tpu-2"})
        (tmp_path / "run" / "lock.json").write_text(write_lock_of_another)
        deadline = time.monotonic() + 5
        while not lock_module._locks[files.name].is_lost and time.monotonic() < deadline:
            time.sleep(0.01)
        for write in (lambda: logger.metrics({"step": 1}), files.upload):
            with pytest.raises(
                UserError,
                match="has taken it over since this one stood still for 0 s",
            ):
                write()
    assert lock_of(tmp_path / "run")["host"] == "tpu-2"
    check_owned(files.name)  # no lock of ours any more, and none that is lost


def test_a_folder_that_cannot_be_made_or_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run_dir .*file/run cannot be made: Not a directory"):
        take(tmp_path / "file" / "run").__enter__()
