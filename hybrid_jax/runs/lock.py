"""One trainer at a time in a run directory: a lock that says who it is, and that no dead one keeps.

The lock is the file ``lock.json``: host, process and since when. The trainer renews it while it runs and
removes it at its end, however it ends; only a process that is killed leaves it behind. Then the next trainer
takes it over:

- on the same host at once, since there is no such process any more, or it is a younger one of the same number;
- on another host (or in another container) when it has not been renewed for `GONE_SECONDS`. The newcomer
  watches it for that long by its own clock, so that the clocks of two hosts need not agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.writing import write_text

LOCK = "lock.json"
BEAT_SECONDS = 10.0  # how often a trainer renews its lock
GONE_SECONDS = 60.0  # a lock of another host that was not renewed for so long is taken over
_LOOK_SECONDS = 1.0  # how often a newcomer looks at such a lock
_STUCK_SECONDS = 5.0  # nobody needs that long to replace a small file

log = logging.getLogger(__name__)


class LockFile(Protocol):
    """A small file whose change is refused where another process has changed it since it was read."""

    def read(self) -> tuple[str, Any] | None:
        """Returns the text and its version; None where there is no file."""
        ...

    def swap(self, version: Any, text: str) -> Any:
        """Replaces ``version`` (None: no file) by ``text``; returns the new version, or None."""
        ...

    def remove(self, version: Any) -> None:
        """Removes the file if it is still at ``version``."""
        ...


@dataclass(frozen=True)
class Holder:
    """A process that trains.

    Attributes:
        host: the name of its machine.
        system: which start of the machine's system and which container; process numbers mean nothing outside.
        pid: its number.
        started: when it started, as the system counts; another process of this number has another one. Empty
            where the system does not say: then nobody is near.
        since: when it took the lock, for people.
        mark: tells one lock of a process from its next one.
        beat: how often it has renewed the lock.
    """

    host: str
    system: str
    pid: int
    started: str
    since: str
    mark: str
    beat: int = 0

    def is_near(self) -> bool:
        """Tells whether this process can see if that one lives."""
        return self.started != "" and (self.host, self.system) == (socket.gethostname(), _system())

    def is_alive(self) -> bool:
        """Tells whether the process of a lock on this machine still runs."""
        started = _started(self.pid)
        return started == self.started or (started == "" and _is_hidden(self.pid))


@contextlib.contextmanager
def owned(file: LockFile, name: str) -> Iterator[None]:
    """Holds a lock for everything that a process writes into a run directory; reentrant in one thread.

    Args:
        file: the lock.
        name: of the run directory, for messages.

    Raises:
        UserError: another process trains there.
    """
    if (lock := _locks.get(name)) is not None and lock.thread == threading.get_ident():
        yield
        return
    if lock is not None:
        raise UserError(_refusal(name, lock.holder))
    lock = _locks[name] = _Lock(file, name)
    try:
        lock.take()
        yield
    finally:
        del _locks[name]
        lock.release()


def check_owned(name: str, *, look: bool = False) -> None:
    """Checks that what this process trains is still there, and that no other one has taken it over.

    Args:
        name: of the run directory.
        look: whether to look now, before what cannot be taken back; else it is known from the last renewal.

    Raises:
        UserError: this process must write nothing more.
    """
    if (lock := _locks.get(name)) is not None and (lock.is_lost or (look and lock.look())):
        raise UserError(
            f"run_dir {name} was moved or removed while it was trained, or another process has taken it over "
            f"since this one stood still for {GONE_SECONDS:.0f} s: this one ends and writes nothing more"
        )


class _Lock:
    """The lock of one run directory, from its taking to its release."""

    def __init__(self, file: LockFile, name: str):
        self.thread = threading.get_ident()
        self.is_lost = False
        now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        me = os.getpid()
        self.holder = Holder(socket.gethostname(), _system(), me, _started(me), now, secrets.token_hex(8))
        self._file, self._name = file, name
        self._version: Any = None  # of the file, while it is ours
        self._end = threading.Event()
        self._beats = threading.Thread(target=self._renew, name="run lock", daemon=True)

    def take(self) -> None:
        while self._version is None:
            there, version = self._read()
            if there is not None:
                self._wait_for_end(there, version)
                if there.pid != self.holder.pid:
                    log.info("took over run_dir %s from %s, which is gone", self._name, _who(there))
            self._version = self._write(version)
        self._beats.start()

    def look(self) -> bool:
        """Tells whether the lock is no longer there, or another one's."""
        with contextlib.suppress(OSError, UserError):  # a network that is away for a moment
            found = self._read()[0]
            self.is_lost = found is None or found.mark != self.holder.mark
        return self.is_lost

    def release(self) -> None:
        self._end.set()
        if self._beats.is_alive():
            self._beats.join()
        if self._version is not None and not self.is_lost:
            try:
                self._file.remove(self._version)
            except (OSError, UserError) as error:  # the next one finds that we are gone
                log.warning("the lock of run_dir %s could not be removed: %s", self._name, error)

    def _wait_for_end(self, there: Holder, version: Any) -> None:
        """Returns when the holder is known to be gone, or has left.

        Raises:
            UserError: it lives.
        """
        if there.is_near():
            # One of this process that nobody holds is one that could not be removed.
            held_here = {lock.holder.mark for lock in list(_locks.values())}
            if there.is_alive() and (there.pid != self.holder.pid or there.mark in held_here):
                raise UserError(_refusal(self._name, there))
            return
        log.info(
            "run_dir %s is locked by %s; waiting up to %.0f s to see whether it is still there",
            *(self._name, _who(there), GONE_SECONDS),
        )
        until = time.monotonic() + GONE_SECONDS
        while time.monotonic() < until:
            time.sleep(_LOOK_SECONDS)
            if (seen := self._read())[0] is None:
                return
        if seen[1] != version:
            raise UserError(_refusal(self._name, there))

    def _read(self) -> tuple[Holder | None, Any]:
        found = self._file.read()
        if found is None:
            return None, None
        try:
            return Holder(**json.loads(found[0])), found[1]
        except (
            ValueError,
            TypeError,
            RecursionError,
        ):  # after a power cut perhaps: as one of a host that we know nothing of
            return Holder("an unknown host", "", 0, "", "an unknown time", ""), found[1]

    def _write(self, version: Any) -> Any:
        """Writes the lock in the place of ``version``; returns its new version, None where it is not ours."""
        written = self._file.swap(version, json.dumps(dataclasses.asdict(self.holder)))
        if written is None:
            there, found = self._read()
            if there is not None and there.mark == self.holder.mark:
                return found  # of a write that was made although its answer was lost on the way
        return written

    def _renew(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            self.holder = dataclasses.replace(self.holder, beat=self.holder.beat + 1)
            try:
                version = self._write(self._version)
            except (OSError, UserError):  # a full disk perhaps; or the folder was moved away
                if self.look():
                    return
                continue
            if version is None:
                self.is_lost = True
                return
            self._version = version


_locks: dict[str, _Lock] = {}  # by run directory


class DiskLockFile:
    """A file on a disk, with the folder around it, which goes again if nothing else was put there.

    Its version is its text. It is replaced by a rename, and whoever does so is alone for that moment by the
    exclusive creation of a second file, which works on network disks too.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._guard = folder / f"{LOCK}.busy"
        self._made: list[Path] = []

    def read(self) -> tuple[str, str] | None:
        """Returns the text, which is its own version; None where there is no file."""
        try:
            text = self._path.read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}") from error
        return text, text

    def swap(self, version: str | None, text: str) -> str | None:
        """Writes ``text`` in the place of ``version`` (None: of nothing), and returns its version.

        None where something else lies there by now.
        """
        if version is None:
            self._make_folder()  # not again where it was moved away
        with (
            contextlib.suppress(FileNotFoundError),
            self._alone(),
        ):  # the folder is gone: whose it was has ended
            found = self.read()
            if (found and found[0]) == version:
                write_text(self._path, text)
                return text
        return None

    def remove(self, version: str) -> None:
        """Removes the file if it is still at ``version``, and folders that were made for it."""
        with contextlib.suppress(FileNotFoundError), self._alone():
            if self.read() == (version, version):
                self._path.unlink()
        for folder in self._made:  # the innermost first
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()

    def _make_folder(self) -> None:
        folder = self._path.parent
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = "it is a link to nowhere" if folder.is_symlink() else error.strerror
            raise UserError(f"run_dir {folder} cannot be made: {reason}") from error
        self._made += missing

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Guards a change of the lock file; removes the guard of a killed process after a while."""
        first_seen, waits_for = time.monotonic(), None
        while True:
            try:
                os.close(os.open(self._guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    status = self._guard.stat()
                    if (status.st_ino, status.st_mtime_ns) != waits_for:
                        first_seen, waits_for = time.monotonic(), (status.st_ino, status.st_mtime_ns)
                    elif time.monotonic() - first_seen > _STUCK_SECONDS:
                        self._guard.unlink()
                time.sleep(0.01)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise UserError(f"{self._path} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            self._guard.unlink(missing_ok=True)


def _refusal(name: str, holder: Holder) -> str:
    stop = f"stop it (kill {holder.pid})" if holder.is_near() else "stop it there"
    return (
        f"run_dir {name} is being trained by {_who(holder)}: wait for its end, {stop}, or give another run_dir"
    )


def _who(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} since {holder.since}"


@functools.cache
def _system() -> str:
    """This start of the system and this container; nothing where the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_hidden(pid: int) -> bool:
    """Tells whether a process of this number exists, also one of another user that the system hides."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):  # there is none
        pass
    return False


def _started(pid: int) -> str:
    """The start of a process, as the system counts time; empty where that cannot be known."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            return ""
        return "" if state in "ZX" else fields[18]  # dead, but its parent has not asked yet
    try:
        told = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C", "TZ": "UTC0"},  # whoever asks, it is the same text
        )
    except OSError:  # Windows has none
        return ""
    return told.stdout.strip()
