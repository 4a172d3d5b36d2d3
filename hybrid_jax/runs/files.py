"""Finds the files of a run: in its directory, or in a bucket with a copy on this machine.

A run directory may be a URL ``gs://bucket/path``. Its checkpoints are then written to the bucket and read from
it directly, by every process its own part. All other files are worked on in a folder of this process. They are
fetched when the run is opened and uploaded when they have changed: at the start, before every checkpoint, with
every evaluation and at the end. Since they go up before the checkpoint does, a run that goes on from the newest
one on another machine finds every record of the steps before it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hybrid_jax.core.config import is_url
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.writing import user_cache
from hybrid_jax.parallel import hosts
from hybrid_jax.runs import lock
from hybrid_jax.runs.bucket import BucketLockFile, explained, open_bucket

CHECKPOINTS = "checkpoints"
EARLIER = "earlier_"  # and a number: what trainings left whose checkpoints are gone

_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]+(/[^/?#*\[\]]+)+")
_FETCHED_FOLDERS = ("tokenizer",)  # beside the files at the top; exports and traces are only written
_UNFINISHED = (".new", ".kept")  # what `run_directory` and `loggers` swap in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """The files of a run in a directory on this machine.

    Attributes:
        name: the run directory as the user gave it.
        folder: where the files lie to be worked on.
        checkpoints: where the checkpoints lie, a `Path` or an `etils.epath.Path`.
    """

    name: str
    folder: Path
    checkpoints: Any

    def fetch(self) -> None:
        """Brings what has changed elsewhere into ``folder``."""

    def upload(self) -> None:
        """Brings what has changed in ``folder`` to where it belongs, if the run is still ours."""
        lock.check_owned(self.name, look=True)

    @property
    def where(self) -> str:
        """The path of the run directory, absolute where it is local, so that it holds in any current folder."""
        return self.name if is_url(self.name) else str(self.folder)

    def names(self) -> list[str]:
        """The names at the top of the run directory without the lock; empty where there is no such folder.

        Raises:
            UserError: it is no folder, or cannot be read.
        """
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            if self.folder.exists():
                raise UserError(f"run_dir must be a directory, got the file {self.name}") from None
            return []  # below a file: it cannot be made
        except OSError as error:
            raise UserError(f"run_dir {self.name} cannot be read: {error.strerror}") from error
        return [name for name in names if not name.startswith(lock.LOCK)]

    def read(self, name: str) -> str | None:
        """The text of a file where it belongs, without a `fetch`; None where there is none."""
        try:
            return (self.folder / name).read_text(errors="replace")
        except OSError:
            return None

    def remove(self, folder: str) -> None:
        """Removes a folder of the run."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)

    def set_aside(self, names: Iterable[str]) -> str:
        """Moves what is there of ``names`` into a new folder ``earlier_<number>``; returns its name."""
        there, number = set(self.names()), 1
        while f"{EARLIER}{number}" in there:
            number += 1
        folder = self.folder / f"{EARLIER}{number}"
        try:
            folder.mkdir()
            for name in names:
                if (path := self.folder / name).exists():
                    path.rename(folder / name)
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from error
        return folder.name

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Holds the lock of the run directory during a training. The first process locks for all of its run.

        Raises:
            UserError: another process trains here, or the folder holds something that is no run.
        """
        if not hosts.is_first():
            hosts.barrier()  # the lock is taken, or this process is told why not
            yield
            return
        with lock.owned(self._lock_file(), self.name):
            hosts.barrier()
            yield

    def _lock_file(self) -> lock.LockFile:
        return lock.DiskLockFile(self.folder)

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> _Uploads:
        """A logger that uploads after an evaluation and at the end; it comes last."""
        return _Uploads(self)


def run_files(run_dir: str | Path) -> RunFiles:
    """The files of a run directory or of a URL; they are not fetched yet.

    Raises:
        UserError: the URL is none of a bucket, or a package is missing that reads it.
    """
    if not is_url(run_dir):
        folder = Path(run_dir).absolute()  # whatever becomes the current folder
        return RunFiles(str(run_dir), folder, folder / CHECKPOINTS)
    return _in_bucket(str(run_dir).rstrip("/"))


def fetched(run_dir: str | Path) -> RunFiles:
    """`run_files` with what the bucket holds now."""
    files = run_files(run_dir)
    files.fetch()
    return files


class _InBucket(RunFiles):
    """The files of a run in a bucket; its folder is removed when the process ends."""

    def __init__(self, url: str):
        if not _URL.fullmatch(url):
            raise UserError(f"a run directory must be a folder or a URL gs://bucket/path, got {url!r}")
        with explained(url, "opened"):
            self._system, self._root = open_bucket(url)
            from etils import epath

            checkpoints = epath.Path(f"{url}/{CHECKPOINTS}")
        super().__init__(url, _private_folder(PurePosixPath(url).name), checkpoints)
        self._there: dict[str, Any] = {}  # by name, the generation that was fetched
        self._here: dict[
            str, tuple[int, int]
        ] = {}  # by name, size and time of what has been uploaded or fetched
        self._ours: set[str] = set()  # uploaded by this process, which alone writes them

    def fetch(self) -> None:
        with explained(self.name, "read"):
            for name, generation in self._listed().items():
                if name in self._ours or self._there.get(name) == generation:
                    continue
                local = self.folder / name
                local.parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(f"{self._root}/{name}", str(local))
                self._there[name], self._here[name] = generation, _stamp(local)

    def upload(self) -> None:
        super().upload()
        with explained(self.name, "written"):
            for name, stamp in _files(self.folder):
                if self._here.get(name) != stamp:
                    self._system.put_file(str(self.folder / name), f"{self._root}/{name}")
                    self._here[name] = stamp
                    self._ours.add(name)

    def _lock_file(self) -> lock.LockFile:
        return BucketLockFile(f"{self.name}/{lock.LOCK}")

    def names(self) -> list[str]:
        with explained(self.name, "read"), contextlib.suppress(FileNotFoundError):
            paths = self._system.ls(self._root, detail=False)
            names = (path.rstrip("/").removeprefix(f"{self._root}/") for path in paths)
            return sorted(name for name in names if not name.startswith(lock.LOCK))
        return []

    def read(self, name: str) -> str | None:
        with explained(self.name, "read"), contextlib.suppress(FileNotFoundError):
            return self._system.cat_file(f"{self._root}/{name}").decode(errors="replace")
        return None

    def set_aside(self, names: Iterable[str]) -> str:
        """The copies in the bucket are replaced as the new run writes its own; a tokenizer's are removed."""
        aside = super().set_aside(names)
        self.upload()
        self.remove("tokenizer")
        return aside

    def remove(self, folder: str) -> None:
        super().remove(folder)
        with explained(self.name, "written"):
            for path in self._system.find(f"{self._root}/{folder}"):
                self._system.rm_file(path)
        known = [name for name in (*self._here, *self._there) if name.startswith(f"{folder}/")]
        for name in known:
            self._here.pop(name, None)
            self._there.pop(name, None)

    def _listed(self) -> dict[str, Any]:
        """The files to fetch, with what tells one version from another."""
        found = []
        for folder in _FETCHED_FOLDERS:  # nothing, or an error where there is no such bucket
            found += self._system.find(f"{self._root}/{folder}", detail=True).values()
        with contextlib.suppress(FileNotFoundError):  # of a new run
            found += self._system.ls(self._root, detail=True)
        return {
            name: info.get("generation")
            for info in found
            if (name := info["name"].removeprefix(f"{self._root}/")) != lock.LOCK
            and info["type"] == "file"
            and not name.endswith("/")
        }


_in_bucket = functools.cache(_InBucket)  # one a process: what it writes, it must not fetch


@dataclass(frozen=True)
class _Uploads:
    """A logger whose log is the bucket; and that ends a run which another process has taken over."""

    files: RunFiles

    def metrics(self, record: dict[str, Any]) -> None:
        lock.check_owned(self.files.name)  # they go up before the next checkpoint

    def samples(self, records: list[dict[str, Any]]) -> None:
        self.files.upload()

    def close(self) -> None:
        try:
            self.files.upload()
        except UserError as error:  # a run that ends well uploads once more; else an error is on its way
            log.warning("%s", error)


def _private_folder(name: str) -> Path:
    """A folder of this name for this process alone: one that only reads must not undo what another writes."""
    runs = user_cache() / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        own = tempfile.mkdtemp(dir=runs)
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        (folder := Path(own) / name).mkdir()
    except OSError as error:
        raise UserError(
            f"{runs} cannot be written: {error.strerror}; set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _files(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and stamps of all files in a folder that are finished."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.endswith(_UNFINISHED))
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink() and not name.endswith(_UNFINISHED):
                yield path.relative_to(folder).as_posix(), _stamp(path)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
