"""Where the files of a run are: in its directory, or in a bucket with a copy on this machine.

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
import importlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hybrid_jax.core.config import is_url
from hybrid_jax.core.registry import UserError

CHECKPOINTS = "checkpoints"

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
        """Brings what has changed in ``folder`` to where it belongs."""

    def remove(self, folder: str) -> None:
        """Removes a folder of the run."""
        shutil.rmtree(self.folder / folder, ignore_errors=True)

    def open(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> _Uploads:
        """A logger that uploads after an evaluation and at the end; it comes last."""
        return _Uploads(self)


def run_files(run_dir: str | Path) -> RunFiles:
    """The files of a run directory or of a URL; they are not fetched yet.

    Raises:
        UserError: the URL is none of a bucket, or a package is missing that reads it.
    """
    if not is_url(run_dir):
        return RunFiles(str(run_dir), Path(run_dir), Path(run_dir) / CHECKPOINTS)
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
        with _explained(url, "opened"):
            self._system, self._root = _open(url)
            from etils import epath

            checkpoints = epath.Path(f"{url}/{CHECKPOINTS}")
        super().__init__(url, _private_folder(PurePosixPath(url).name), checkpoints)
        self._there: dict[str, Any] = {}  # by name, the generation that was fetched
        self._here: dict[
            str, tuple[int, int]
        ] = {}  # by name, size and time of what has been uploaded or fetched
        self._ours: set[str] = set()  # uploaded by this process, which alone writes them

    def fetch(self) -> None:
        with _explained(self.name, "read"):
            for name, generation in self._listed().items():
                if name in self._ours or self._there.get(name) == generation:
                    continue
                local = self.folder / name
                local.parent.mkdir(parents=True, exist_ok=True)
                self._system.get_file(f"{self._root}/{name}", str(local))
                self._there[name], self._here[name] = generation, _stamp(local)

    def upload(self) -> None:
        with _explained(self.name, "written"):
            for name, stamp in _files(self.folder):
                if self._here.get(name) != stamp:
                    self._system.put_file(str(self.folder / name), f"{self._root}/{name}")
                    self._here[name] = stamp
                    self._ours.add(name)

    def remove(self, folder: str) -> None:
        super().remove(folder)
        with _explained(self.name, "written"):
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
            info["name"].removeprefix(f"{self._root}/"): info.get("generation")
            for info in found
            if info["type"] == "file" and not info["name"].endswith("/")
        }


_in_bucket = functools.cache(_InBucket)  # one a process: what it writes, it must not fetch


@dataclass(frozen=True)
class _Uploads:
    """A logger whose log is the bucket."""

    files: RunFiles

    def metrics(self, record: dict[str, Any]) -> None:
        pass  # they go up before the next checkpoint

    def samples(self, records: list[dict[str, Any]]) -> None:
        self.files.upload()

    def close(self) -> None:
        try:
            self.files.upload()
        except UserError as error:  # a run that ends well uploads once more; else an error is on its way
            log.warning("%s", error)


def _private_folder(name: str) -> Path:
    """A folder of this name for this process alone: one that only reads must not undo what another writes."""
    from hybrid_jax.training.compilation import cache_folder  # jax, which a report of a folder needs not

    runs = cache_folder().parent / "runs"
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


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL there."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    # What the other processes write must be seen at once; Orbax opens the bucket by the same settings.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it says at every request what it does not know
    importlib.import_module("google.cloud.storage")  # Orbax needs it to remove an old checkpoint
    return url_to_fs(url)


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


@contextlib.contextmanager
def _explained(url: str, what: str) -> Iterator[None]:
    """Says in one line why a bucket could not be used."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{url} needs gcsfs, which is not installed: pip install 'hybrid_jax[gcs]'") from error
    except Exception as error:  # gcsfs, aiohttp and google-auth have each their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{url} cannot be {what}: {reason}{_advice(error, url)}") from error


def _advice(error: Exception, url: str) -> str:
    bucket = url.split("/")[2]
    if isinstance(error, FileNotFoundError):
        return f"; is there a bucket gs://{bucket}?"
    if re.search(r"(?i)anonymous|credentials|unauthenticated|invalid_grant|\b401\b", str(error)):
        return "; log in by `gcloud auth application-default login`"
    if re.search(r"(?i)forbidden|permission|\b403\b", str(error)):
        return (
            f"; give this machine's account the roles storage.objectUser and storage.legacyBucketReader "
            f"on gs://{bucket}"
        )
    return ""
