"""Reads files that others wrote: only regular files, and no more bytes than such a file can need.

From a pipe nothing may ever come, a device may have no end, and a file called a config may be a disk image.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from hybrid_jax.core.errors import UserError

MEBIBYTE = 2**20
_OTHERS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, kind: str = "file") -> BinaryIO:
    """Opens the file at ``path``, or the one that a link there points to, to read bytes.

    Args:
        path: of the file.
        kind: what to call it in an error, such as "data file".

    Raises:
        UserError: there is none, it cannot be opened, or it is a directory, a pipe, a socket or a device.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            what = _OTHERS.get(stat.S_IFMT(mode), "something else")
            raise UserError(f"{kind} {str(path)!r} is {what}; expected a regular file")
        return Path(path).open("rb")
    except FileNotFoundError:
        raise UserError(f"no {kind} {str(path)!r}") from None
    except (OSError, ValueError) as error:  # a name that holds a zero byte is a ValueError
        raise UserError(f"{kind} {str(path)!r} cannot be read: {reason(error)}") from error


def read_bytes(path: str | Path, most: int, kind: str = "file") -> bytes:
    """Reads the content of a file of at most ``most`` bytes.

    Raises:
        UserError: as `open_regular`, or it has more.
    """
    with open_regular(path, kind) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise UserError(f"{kind} {str(path)!r} cannot be read: {reason(error)}") from error
    if len(content) > most:
        size = f"{most // MEBIBYTE} MiB" if most >= MEBIBYTE else f"{most} bytes"
        raise UserError(f"{kind} {str(path)!r} must have at most {size}, got more: is it the right file?")
    return content


def read_text(path: str | Path, most: int, kind: str = "file") -> str:
    """Reads the UTF-8 text in a file of at most ``most`` bytes, without a byte order mark.

    Raises:
        UserError: as `read_bytes`, or it is no UTF-8.
    """
    return decode(read_bytes(path, most, kind), str(path))


def decode(content: bytes, where: str) -> str:
    """Decodes ``content`` as UTF-8, without a byte order mark.

    Raises:
        UserError: it is something else; the line names ``where``, the byte and its place.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} must be UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error


def reason(error: Exception) -> str:
    """Says in words what the system answered, without the path."""
    return getattr(error, "strerror", None) or str(error)
