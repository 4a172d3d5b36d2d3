"""Rows in words: how many of how many, of which file, and where one stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress
from typing import Any

_PLACE = re.compile(r"(:\d+|, row \d+)$")  # of a row in its file


def places_of(rows: Sequence[Any]) -> list[str]:
    """The place of each row: its ``where``, else its number."""
    return [row.where or f"row {number}" for number, row in enumerate(rows, start=1)]


def share_of(count: int, places: Sequence[str], rows: str = "rows") -> str:
    """Formats a count as ``3 of 88 rows (3.41 %) of train.jsonl``."""
    share = f"{100 * count / len(places):.3g} %" if count < len(places) else "all"
    return f"{count:,} of {len(places):,} {rows} ({share}) of {_file(places)}"


def some_of(chosen: Sequence[bool], places: Sequence[str], rows: str = "rows") -> str:
    """`share_of` the chosen ones, with the first of them; "" where there is none."""
    first = next(compress(places, chosen), None)
    return "" if first is None else f"{share_of(sum(chosen), places, rows)}, first {line_of(first)},"


def line_of(place: str) -> str:
    """The place of a row in its file."""
    match = _PLACE.search(place)
    return match.group().lstrip(", ").replace(":", "line ") if match else place


def _file(places: Sequence[str]) -> str:
    """The file of the first row; rows come from one, as a rule."""
    return _PLACE.sub("", places[0]) if places[0] and not places[0].startswith("row ") else "the data"
