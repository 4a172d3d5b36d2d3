"""Shows at the terminal how far a long preparation is, such as the encoding of a data set."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

FIRST_SECONDS = 3.0  # what takes less is not shown
LINE_SECONDS = 30.0  # between two lines, where stderr is not a terminal


def shown(items: Iterable[T], total: int, doing: str, unit: str) -> Iterator[T]:
    """Yields the items, and shows on stderr how many there were: by a bar, or by a plain line now and then.

    Args:
        items: what is prepared, one after the other.
        total: how many there will be.
        doing: what is done to them, such as "encoding".
        unit: what they are, such as "conversations".
    """
    stream = sys.stderr
    if stream is None:  # closed
        yield from items
    elif stream.isatty():
        from tqdm import tqdm

        yield from tqdm(
            items,
            doing,
            total,
            unit=f" {unit}",
            delay=FIRST_SECONDS,
            leave=False,
            file=stream,
            dynamic_ncols=True,
        )
    else:
        yield from _with_lines(items, total, f"{doing} {unit}")


def _with_lines(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    started = time.monotonic()
    due = started + FIRST_SECONDS
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= due:
            print(
                f"{what}: {done:,} of {total:,} ({done / (now - started):,.0f}/s)", file=sys.stderr, flush=True
            )
            due = now + LINE_SECONDS
