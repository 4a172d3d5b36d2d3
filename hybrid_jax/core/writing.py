"""Writes files of a run directory so that neither a kill nor a full disk leaves them half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hybrid_jax.core.errors import UserError


def user_cache() -> Path:
    """The package's own folder among the caches of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hybrid_jax"


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees the old text or the new one.

    Raises:
        UserError: the file system refused; the old text is still there.
    """
    # A model may write half of a surrogate pair, which UTF-8 cannot hold.
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: Path, content: bytes) -> None:
    """`write_text` of bytes."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Makes a folder in one step by ``write(folder)``, unless it is there already.

    Raises:
        UserError: the file system refused; there is no folder.
    """
    if path.is_dir():
        return
    beside = path.with_name(path.name + ".new")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
