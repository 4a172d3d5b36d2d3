"""The answers of a judge and their cost, on disk: kept over restarts, shared by processes.

One small file for each answer, named by the hash of everything that the answer depends on, and ``spent.json``
with what was paid so far. Neither holds the key of the endpoint, nor the texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import read_json

SPENT = "spent.json"
MOST_BYTES = 4096  # of one of its files


@dataclass(frozen=True)
class Spent:
    """Tokens that were paid for."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    dollars: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers together."""
        return self.prompt_tokens + self.answer_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.dollars + other.dollars,
        )


@dataclass(frozen=True)
class JudgeCache:
    """Answers and their cost in ``folder``, which is made where it is not there."""

    folder: Path

    def find(self, key: str) -> float | None:
        """The answer under ``key``; None where there is none, or a damaged one: then it is asked again."""
        try:
            value = read_json(self._path(key), MOST_BYTES)["value"]
        except (UserError, KeyError):
            return None
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0
        return float(value) if valid else None

    def keep(self, key: str, value: float) -> None:
        """Writes the value of an answer."""
        _write(self._path(key), {"value": value})

    def spent(self) -> Spent:
        """The sum that all runs with this folder have paid.

        Raises:
            UserError: the file is damaged; since the amount is not known, nothing more is paid.
        """
        path = self.folder / SPENT
        if not path.exists():
            return Spent()
        try:
            content = read_json(path, MOST_BYTES)
            return Spent(
                int(content["prompt_tokens"]), int(content["answer_tokens"]), float(content["dollars"])
            )
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} must say what was spent, got a damaged file; mend or delete it") from error

    def pay(self, more: Spent) -> None:
        """Adds to what was spent; processes and threads wait for each other."""
        with self._locked():
            _write(self.folder / SPENT, vars(self.spent() + more))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:  # closing the file releases the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def key_of(*parts: Any) -> str:
    """SHA-256 of what an answer depends on."""
    content = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    """Writes as a whole or not at all, also beside another writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f"{secrets.token_hex(8)}.part")
    try:  # by `open`, so that the umask decides who may read it
        with name.open("x") as file:
            json.dump(content, file)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
