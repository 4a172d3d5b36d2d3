"""A folder with the memories of users, a safetensors file for each: what one model has read of them.

    DIR/NAME.safetensors   the arrays of the memory, and beside them in the header: user, model (a digest of its
                           parameters), tokens, ended and digest, that of all the rest

A file is replaced as a whole, so that a kill or a full disk leaves the old memory.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import reason
from hybrid_jax.core.fingerprint import digest
from hybrid_jax.core.writing import write_bytes
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.folders.files import open_safetensors, read_metadata
from hybrid_jax.models.memory.keeping import Kept, check_keeps, nothing_kept

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Memory:
    """The memory of one user: arrays [1 ...], how many tokens were read, and whether the last answer ended."""

    kept: Kept
    tokens: int = 0
    ended: bool = True


class MemoryFolder:
    """The memory of one user of one model.

    Args:
        folder: that holds the memories; it is made if it is not there.
        user: whose it is.
        model: that remembers.
        params: of the model.

    Raises:
        UserError: the name is none for a file, the folder cannot be made, or a memory cannot be kept.
    """

    def __init__(self, folder: str | Path, user: str, model: LanguageModel, params: Params):
        if not _NAME.fullmatch(user):
            raise UserError(
                "--user must be a name of at most 64 letters a-z, digits, '.', '_' and '-' that begins with a "
                f"letter or a digit, got {user[:80]!r}"
            )
        check_keeps(model)
        self._path, self._user = Path(folder) / f"{user}.safetensors", user
        self.nothing = Memory(nothing_kept(model))
        self._model = digest(jax.tree.map(np.asarray, params))
        self._version: str | None = None  # of the file, as it was read or written last
        self._make_folder()  # at once: nobody waits for an answer that cannot be kept

    def read(self) -> Memory:
        """The memory; one of nothing where there is no file.

        Raises:
            UserError: the file is damaged, or of another user, another model or another shape.
        """
        if not self._path.exists():
            return self.nothing
        try:
            about, stored = read_metadata(self._path), open_safetensors(self._path, check_finite=True)
        except UserError as error:
            self._refuse(f"is damaged ({error})")
        if about.get("user") != self._user:
            self._refuse(f"holds the memory of {about.get('user')!r}, not of {self._user!r}")
        if about.get("model") != self._model:
            self._refuse("is the memory of another model, or of this one before it learned on")
        arrays = {}
        for name, shape in _named(self.nothing.kept).items():
            tensor = stored.pop(name, None)
            array = None if tensor is None else tensor()
            if array is None or array.shape != shape.shape or array.dtype != shape.dtype:
                got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
                self._refuse(f"has another shape: {name} must be {shape.dtype} {list(shape.shape)}, got {got}")
            arrays[name] = array
        if stored or about.get("digest") != _digest(about, arrays):
            self._refuse("is damaged (it is not as it was written)")
        structure = jax.tree.structure(self.nothing.kept)
        kept = jax.tree.unflatten(structure, list(map(jax.numpy.asarray, arrays.values())))
        self._version = about["digest"]
        log.info("%s is remembered: %s tokens read so far", self._user, about["tokens"])
        return Memory(kept, int(about["tokens"]), about["ended"] == "yes")

    def write(self, memory: Memory) -> None:
        """Puts a memory in the place of the one that it was read from or written as before.

        Raises:
            UserError: it cannot be written, or another process has written meanwhile; the file stays as it is.
        """
        from safetensors.numpy import save

        arrays = {name: np.asarray(x) for name, x in _named(memory.kept).items()}
        about = {
            "user": self._user,
            "model": self._model,
            "tokens": str(memory.tokens),
            "ended": "yes" if memory.ended else "no",
        }
        about["digest"] = _digest(about, arrays)
        self._make_folder()
        there = read_metadata(self._path).get("digest") if self._path.exists() else None
        if there != self._version:
            raise UserError(
                f"{self._path} was changed while this answer was given, so it is not remembered; ask again"
            )
        try:
            write_bytes(self._path, save(arrays, metadata=about))
        except UserError as error:
            raise UserError(f"{error}: the answer is not remembered, what was remembered before is") from error
        self._version = about["digest"]

    def _make_folder(self) -> None:
        folder = self._path.parent
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--memory {folder} is a file; give a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--memory {folder} cannot be made: {reason(error)}; give another folder"
            raise UserError(problem) from error

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self._path} {problem}; remove it to begin anew, or give another --memory")


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the words of their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _digest(about: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    told = {name: text for name, text in about.items() if name != "digest"}
    return digest([sorted(told.items()), arrays])
