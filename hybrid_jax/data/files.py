"""The bytes of data files: plain, or gzip where the name ends in ``.gz``, row by row or as one text."""

from __future__ import annotations

import gzip
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, decode, open_regular, reason
from hybrid_jax.core.json_text import MOST_NESTED, parse_json

MOST_ROW = 64 * MEBIBYTE  # of one line
MOST_EXPANDED = 100  # bytes for each one packed: text has 3 to 10, a file made to fill the memory up to 1,000
_FREE = 16 * MEBIBYTE  # unpacked bytes from which on that limit holds
_CHUNK = MEBIBYTE
_SPACE = re.compile(rb"[ \t\r\n]*")
# A whole text, the quote of one that does not end here, or a bracket. Nothing is tried twice.
_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.DOTALL)


def read_data(path: Path) -> str:
    """Reads the whole text of a file.

    Raises:
        UserError: it is no regular file, cannot be read or unpacked, or is no UTF-8.
    """
    return decode(b"".join(_chunks(path)), str(path))


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads each row of a JSON file, with its place: ``file:line``, or ``file, row N`` of a list.

    The file holds one object a line, or one list of objects, on as many lines as it likes (read row by row, so
    it may be larger than the memory). It may also be one object that holds nothing but such a list, with texts
    and numbers beside it.

    Raises:
        UserError: as `read_data`, or a row is no JSON object, read strictly (`core.json_text`).
    """
    values = _Values(_chunks(path), str(path))
    if values.next() == b"[":
        yield from _listed_rows(values)
        return
    rows = _line_rows(path)
    first, second = next(rows, None), next(rows, None)
    if first is not None and second is None:  # one line, or one object
        yield from _unwrapped(*first, path)
        return
    yield from (row for row in (first, second) if row is not None)
    yield from rows


def _line_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file with one object a line; one object over many lines is a row, too."""
    lines = enumerate(_lines(path), start=1)
    is_first = True
    for number, line in lines:
        if not line or line.isspace():
            continue
        where = f"{path}:{number}"
        if is_first and not _is_closed(line):
            line = _whole(line, (rest for _, rest in lines), str(path))
        is_first = False
        row = parse_json(decode(line, where), where, first_line=number if b"\n" in line else 1)
        if not isinstance(row, dict):
            raise _no_object(where, type(row).__name__)
        yield where, row


def _listed_rows(values: _Values) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file that is one list."""
    values.skip()
    number, following = 0, values.next()
    while following != b"]" or number:
        number += 1
        where = f"{values.where}, row {number}"
        if values.next() != b"{":
            raise _no_object(where, _sign(values.next()))
        line = values.line
        yield where, parse_json(decode(values.take(where), where), where, line)
        following = values.next()
        if following == b"]":
            break
        if following != b",":
            raise UserError(f"{where}: not JSON: expected , or ] behind the row, got {_sign(following)}")
        values.skip()
    values.skip()
    if values.next():
        raise UserError(f"{values.where}: not JSON: text behind the list, at line {values.line}")


def _unwrapped(where: str, row: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The only object of a file: a row, or the rows of the one list in it."""
    held = [value for value in row.values() if isinstance(value, list | dict)]
    rows = held[0] if len(held) == 1 and isinstance(held[0], list) else []
    is_message = any(isinstance(item, dict) and {"role", "from"} & item.keys() for item in rows)
    several_fields = len(row) > 1 and {"prompt", "messages", "text", "completion", "response"} & row.keys()
    if not rows or is_message or several_fields or not all(isinstance(item, dict) for item in rows):
        yield where, row
        return
    for number, item in enumerate(rows, start=1):
        yield f"{path}, row {number}", item


class _Values:
    """The unread bytes of a file, value by value; a chunk more is read where they hold no whole one."""

    def __init__(self, chunks: Iterator[bytes], where: str):
        self._chunks, self._bytes, self._at = chunks, b"", 0
        self.where, self.line = where, 1

    def next(self) -> bytes:
        """Finds the next byte that is no space; b"" at the end of the file."""
        while True:
            end = _SPACE.match(self._bytes, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            self._move(end)
            if self._at < len(self._bytes) or not self._more():
                return self._bytes[self._at : self._at + 1]

    def skip(self) -> None:
        """Leaves out the next byte."""
        self._at += 1

    def take(self, where: str) -> bytes:
        """Takes the object that begins here."""
        depth, at = 0, self._at
        while True:
            for match in _BRACKET.finditer(self._bytes, at):
                sign = match[0]
                if sign == b'"':  # a text that goes on in the next chunk
                    at = match.start()
                    break
                at = match.end()
                depth += (sign in b"{[") - (sign in b"}]")
                if depth == 0:
                    value = self._bytes[self._at : at]
                    self._move(at)
                    return value
                if depth > MOST_NESTED:
                    raise UserError(f"{where}: more than {MOST_NESTED} objects and lists in one another")
            if len(self._bytes) - self._at > MOST_ROW:
                raise _too_long(where, "a row")
            at -= self._at
            if not self._more():
                raise UserError(f"{where}: not JSON: the file ends inside the row, at line {self.line}")

    def _move(self, to: int) -> None:
        self.line += self._bytes.count(b"\n", self._at, to)
        self._at = to

    def _more(self) -> bool:
        chunk = next(self._chunks, b"")
        kept = self._bytes[self._at :]
        # A byte order mark may stand before the first value.
        self._bytes, self._at = kept + (chunk if self._bytes else chunk.removeprefix(BOM_UTF8)), 0
        return bool(chunk)


def _is_closed(line: bytes) -> bool:
    """Tells whether every bracket that the line opens outside of texts is closed."""
    signs = [match[0] for match in _BRACKET.finditer(line)]
    return b'"' not in signs and sum((sign in b"{[") - (sign in b"}]") for sign in signs) <= 0


def _whole(first: bytes, rest: Iterator[bytes], where: str) -> bytes:
    lines, size = [first], len(first)
    for line in rest:
        lines.append(line)
        size += len(line) + 1
        if size > MOST_ROW:
            raise _too_long(where, "one object")
    return b"\n".join(lines)


def _sign(byte: bytes) -> str:
    return repr(byte.decode("utf-8", "replace")) if byte else "the end of the file"


def _no_object(where: str, got: str) -> UserError:
    return UserError(f"{where}: expected an object of fields, got {got}")


def _too_long(where: str, what: str) -> UserError:
    most = MOST_ROW // MEBIBYTE
    return UserError(f"{where}: {what} must have at most {most} MiB, got more; write one row a line")


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
