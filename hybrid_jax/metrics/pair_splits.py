"""Splits of pairs by prompt, with lengths that tell nothing, and what two files have in common."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.metrics.text import ngrams, words

Row = Mapping[str, Any]
TEXTS = ("prompt", "chosen", "rejected", "response", "completion")


def split_by_prompt(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Divides the rows so that all of one prompt are on one side, chosen by a hash of the prompt.

    Args:
        rows: with a ``prompt``.
        fraction: of the prompts that go to the second side, in (0, 1); at least one does.

    Raises:
        UserError: there are fewer than two prompts.
    """
    prompts = sorted({str(row["prompt"]) for row in rows}, key=_digest)
    if len(prompts) < 2:
        raise UserError(f"a split needs at least two prompts, got {len(prompts)}")
    held_out = set(prompts[: min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    sides: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        sides[str(row["prompt"]) in held_out].append(row)
    return sides


def length_matched(rows: Sequence[Row], ratio: float) -> list[Row]:
    """The pairs of which the lengths tell nothing: answers of like length, and either wins as often.

    A pair is kept where |log(words of the better / words of the worse)| is at most ``ratio``. Of those that the
    longer answer won and of those that the shorter one won the surplus is left out, chosen by a hash.

    Args:
        rows: with ``chosen`` and ``rejected``.
        ratio: at least 0.
    """
    near = [row for row in rows if abs(_length_ratio(row)) <= ratio]
    longer = sorted((row for row in near if _length_ratio(row) > 0), key=_row_digest)
    shorter = sorted((row for row in near if _length_ratio(row) < 0), key=_row_digest)
    count = min(len(longer), len(shorter))
    left_out = {id(row) for row in (*longer[count:], *shorter[count:])}
    return [row for row in near if id(row) not in left_out]


def longer_wins(rows: Sequence[Row]) -> float:
    """The share of pairs that the longer answer won; equal lengths count one half, no rows are 0.5."""
    signs = [(math.copysign(1, ratio) if (ratio := _length_ratio(row)) else 0) for row in rows]
    return sum(0.5 * (sign + 1) for sign in signs) / len(signs) if signs else 0.5


def leaks(train: Sequence[Row], held_out: Sequence[Row], n: int) -> dict[str, list[int]]:
    """The held-out rows that share something with the training rows, by what they share.

    Case, punctuation and white space do not count. ``prompts`` and ``responses`` are whole texts, ``passages``
    are ``n`` words in a row of a prompt or a response.

    Args:
        train: rows with texts.
        held_out: the same.
        n: words of a passage, at least 1.
    """
    seen: dict[str, set[Any]] = {"prompts": set(), "responses": set(), "passages": set()}
    for row in train:
        for kind, found in _contents(row, n).items():
            seen[kind] |= found
    shared: dict[str, list[int]] = {kind: [] for kind in seen}
    for number, row in enumerate(held_out):
        for kind, found in _contents(row, n).items():
            if found & seen[kind]:
                shared[kind].append(number)
    return shared


def _contents(row: Row, n: int) -> dict[str, set[Any]]:
    texts = {name: row.get(name) for name in TEXTS}
    told = {name: tuple(words(text)) for name, text in texts.items() if isinstance(text, str)}
    answers = {found for name, found in told.items() if name != "prompt" and found}
    prompt = {told["prompt"]} if told.get("prompt") else set()
    passages = {gram for found in told.values() for gram in ngrams(found, n)}
    return {"prompts": prompt, "responses": answers, "passages": passages}


def _length_ratio(row: Row) -> float:
    better, worse = (max(len(str(row[name]).split()), 1) for name in ("chosen", "rejected"))
    return math.log(better / worse)


def _row_digest(row: Row) -> bytes:
    return _digest("\0".join(str(row[name]) for name in ("prompt", "chosen", "rejected")))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
