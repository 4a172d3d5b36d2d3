"""The bytes of data files: plain, or gzip where the name ends in ``.gz``, line by line or as one text."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, decode, open_regular, reason
from hybrid_jax.core.json_text import parse_json

MOST_ROW = 64 * MEBIBYTE  # of one line
MOST_EXPANDED = 100  # bytes for each one packed: text has 3 to 10, a file made to fill the memory up to 1,000
_FREE = 16 * MEBIBYTE  # unpacked bytes from which on that limit holds
_CHUNK = MEBIBYTE


def read_data(path: Path) -> str:
    """Reads the whole text of a file.

    Raises:
        UserError: it is no regular file, cannot be read or unpacked, or is no UTF-8.
    """
    return decode(b"".join(_chunks(path)), str(path))


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads each row of a file of JSON lines, with its ``file:line``; skips blank lines.

    Raises:
        UserError: as `read_data`, or a line holds no JSON object, read strictly (`core.json_text`).
    """
    for number, line in enumerate(_lines(path), start=1):
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        row = parse_json(decode(line, where), where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object of fields, got {type(row).__name__}")
        yield where, row


def _lines(path: Path) -> Iterator[bytes]:
    number, rest = 0, b""
    for chunk in _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
        number += len(lines)
        if len(rest) > MOST_ROW:
            most = MOST_ROW // MEBIBYTE
            raise UserError(
                f"{path}:{number + 1}: a line must have at most {most} MiB, got more; split the row"
            )
    yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    unpacked = 0
    with open_regular(path, "data file") as file:
        content = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        try:
            while chunk := content.read(_CHUNK):
                yield chunk
                unpacked += len(chunk)
                if content is not file and unpacked > max(_FREE, MOST_EXPANDED * file.tell()):
                    raise UserError(
                        f"{path} unpacks to more than {MOST_EXPANDED} times its size, as no text does; if it "
                        "is right, unpack it (gunzip) and name the plain file"
                    )
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {reason(error)}") from error
