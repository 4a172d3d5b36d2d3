"""The files of a tokenizer that somebody else wrote, looked at before a library reads them whole."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, open_regular
from hybrid_jax.core.json_text import MOST_TOKENIZER, read_json

VOCABULARY, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # how a file of tiktoken begins
_VOCABULARIES = (VOCABULARY, "vocab.json", "vocab.txt", "merges.txt", "*.model")
_SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")


def check_tokenizer_files(folder: Path) -> None:
    """Checks what bounds the time and memory that reading a folder's tokenizer takes.

    Raises:
        UserError: one of its files is no regular one, too large, or should hold a JSON object and does not.
    """
    for path in (path for pattern in _VOCABULARIES for path in sorted(folder.glob(pattern))):
        with open_regular(path, "tokenizer file") as file:
            size = file.seek(0, 2)
        if size > MOST_TOKENIZER:
            most, got = MOST_TOKENIZER // MEBIBYTE, size // MEBIBYTE
            raise UserError(f"tokenizer file {str(path)!r} must have at most {most} MiB, got {got}")
    for name in _SETTINGS:
        if (folder / name).exists():
            read_json(folder / name, kind="tokenizer file")


def missing_package(folder: Path) -> str | None:
    """The package that a folder with a ``tokenizer.model`` alone needs and that is not installed."""
    path = folder / SENTENCEPIECE
    if (folder / VOCABULARY).exists() or not path.is_file():
        return None
    with open_regular(path, "tokenizer file") as file:
        package = "tiktoken" if _RANK.match(file.read(1024)) else "sentencepiece"
    return None if _is_installed(package) else package


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
