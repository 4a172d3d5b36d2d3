"""Reads JSON strictly, as RFC 8259 defines it: what is not JSON, or could mean two things, is an error.

Python's own reader lets the last of two equal keys win, reads ``NaN`` and ``1e999``, keeps half a character
(``"\\ud83d"`` alone), and ends in a traceback over 20,000 brackets or an integer of 5,000 digits.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, read_text

MOST_NESTED = 100  # levels of objects and lists: more than any data or config has
MOST_BYTES = 32 * MEBIBYTE  # in a JSON file: the index of a model with 150,000 tensors takes 15 MiB
MOST_TOKENIZER = 128 * MEBIBYTE  # in a vocabulary: one with 260,000 tokens takes 35 MiB


def parse_json(text: str, where: str, first_line: int = 1, *, infinity: bool = False) -> Any:
    """Reads the value that a JSON text holds.

    Args:
        text: of the value.
        where: it stands, for errors.
        first_line: the number of the text's first line in its file, for errors.
        infinity: also read ``Infinity`` and ``-Infinity``, which Python writes and JSON does not have.

    Raises:
        UserError: one line that begins with ``where``: it is not JSON, an object has a key twice, a number is
            NaN, infinite or of thousands of digits, a text holds half a character, or it is nested too deeply.
    """
    try:
        value = (_WITH_INFINITY if infinity else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        number = first_line + error.lineno - 1
        line = f"line {number} " if number > 1 else ""
        raise UserError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if text.count("{") + text.count("[") > MOST_NESTED and _depth(value) > MOST_NESTED:
        raise _too_deep(where)
    if "\\ud" in text or "\\uD" in text:
        _check_characters(value, where)
    return value


def read_json(
    path: Path, most: int = MOST_BYTES, kind: str = "file", *, infinity: bool = False
) -> dict[str, Any]:
    """Reads the object in a JSON file; ``infinity`` as in `parse_json`.

    Raises:
        UserError: there is no such file, it is too large, or there is no object in it.
    """
    content = parse_json(read_text(path, most, kind), str(path), infinity=infinity)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} is there twice; keep one")
            seen.add(key)
    return entries


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"number {shown(text)} is too large for 64 bits")
    return number


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # more digits than Python is willing to read, since that is slow
        raise ValueError(f"number {text[:20]}… has {len(text)} digits") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number; write null, or leave the row out")


def _number_or_infinity(name: str) -> float:
    return _no_number(name) if name == "NaN" else float(name)


_DECODER, _WITH_INFINITY = (
    json.JSONDecoder(object_pairs_hook=_once, parse_float=_number, parse_int=_integer, parse_constant=constant)
    for constant in (_no_number, _number_or_infinity)
)


def _depth(value: Any) -> int:
    """Counts the nesting depth of objects and lists, without recursion."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [item for held in containers for item in (held.values() if isinstance(held, dict) else held)]
    return depth


def _check_characters(value: Any, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{where}: {half} is half a character (a lone surrogate), so the text cannot be written as UTF-8"
        ) from error


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: more than {MOST_NESTED} objects and lists in one another")


def shown(value: Any) -> str:
    """The start of a value as an error shows it, with JSON's ``null``."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 62 else f"{text[:60]}…"
