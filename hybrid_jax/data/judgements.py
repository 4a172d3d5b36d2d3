"""Pairs of answers out of rankings, ratings and votes.

A row is one of

    {"prompt": …, "responses": [texts], "ranking": [places]}     smaller is better, equal is a tie
    {"prompt": …, "responses": [texts], "ratings": [numbers]}    larger is better
    {"prompt": …, "responses": [texts], "votes": [indices]}      of the response that each voter took, or null
    {"prompt": …, "response": text, "rating": number}            one rating; rows of a prompt belong together

Several ratings of one response count with their mean. A pair has a margin: by how many places, by how much in
rating, or by which share of the votes for either the better one is ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown

Row = Mapping[str, Any]
Placed = tuple[str, Row]  # a row, behind where it stands
Which = Literal["all", "extremes"]
KINDS = ("ranking", "ratings", "votes")
RATING = ("prompt", "response", "rating")


class Pairs(NamedTuple):
    """Rows with ``prompt``, ``chosen``, ``rejected``, ``margin``; how many comparisons were too close."""

    rows: list[dict[str, Any]]
    too_close: int


def pairs_of(rows: Iterable[Placed], least_margin: float = 0.0, which: Which = "all") -> Pairs:
    """The pairs of every row.

    Args:
        rows: with their places, for errors.
        least_margin: pairs that are no further apart than this are left out and counted; 0 leaves out ties.
        which: ``all`` pairs of a row, or only its best answer against its worst.

    Raises:
        UserError: a row has none of the forms.
    """
    pairs, too_close = [], 0
    for where, row in _grouped(rows):
        responses, scores, others = _scored(row, where)
        order = sorted(range(len(responses)), key=lambda i: -scores[i])
        for better, worse in combinations(order, 2) if which == "all" else [(order[0], order[-1])]:
            margin = round(scores[better] - scores[worse], 9)  # 4.3 − 4.2 is as far as 4.2 − 4.1
            if margin <= least_margin or responses[better] == responses[worse]:
                too_close += 1
                continue
            texts = {"chosen": responses[better], "rejected": responses[worse]}
            pairs.append({"prompt": row["prompt"], **texts, "margin": margin, **others})
    return Pairs(pairs, too_close)


def _grouped(rows: Iterable[Placed]) -> Iterator[Placed]:
    """The rows, those of single ratings together with the others of their prompt, at the place of the first."""
    groups: dict[str, tuple[str, dict[str, list[float]]]] = {}
    for where, row in rows:
        if not isinstance(row.get("prompt"), str):
            raise UserError(f"{where}: 'prompt' must be a text, got {shown(row.get('prompt'))}")
        if "rating" not in row:
            yield where, row
            continue
        if not isinstance(row.get("response"), str) or not _is_number(row["rating"]):
            raise UserError(f"{where}: a rating needs a 'response', a text, and a 'rating', a number")
        _, found = groups.setdefault(row["prompt"], (where, {}))
        found.setdefault(row["response"], []).append(float(row["rating"]))
    for prompt, (where, found) in groups.items():
        means = [sum(ratings) / len(ratings) for ratings in found.values()]
        if len(found) > 1:
            yield where, {"prompt": prompt, "responses": list(found), "ratings": means}


def _scored(row: Row, where: str) -> tuple[list[str], list[float], dict[str, Any]]:
    """The responses, a score of each (larger is better), and what else the row holds."""
    given = [kind for kind in KINDS if row.get(kind) is not None]
    responses = row.get("responses")
    if len(given) != 1:
        forms = ", ".join(map(repr, KINDS))
        raise UserError(f"{where}: expected one of {forms} beside 'responses', or 'response' with 'rating'")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise UserError(f"{where}: 'responses' must be a list of texts, got {shown(responses)}")
    if len(responses) < 2:
        raise UserError(f"{where}: 'responses' must hold at least two texts, got {len(responses)}")
    (kind,) = given
    others = {key: value for key, value in row.items() if key not in ("prompt", "responses", *KINDS)}
    values = row[kind]
    if kind == "votes":
        return responses, _votes(values, len(responses), where), others
    if not isinstance(values, list) or len(values) != len(responses) or not all(map(_is_number, values)):
        raise UserError(f"{where}: {kind!r} must be {len(responses)} numbers, got {shown(values)}")
    if kind == "ratings":
        return responses, [float(value) for value in values], others
    places = sorted(set(values))
    return responses, [-float(places.index(value)) for value in values], others


def _votes(values: Any, count: int, where: str) -> list[float]:
    """The share of each response in the votes that took one."""
    if not isinstance(values, list) or not all(_is_index(value, count) for value in values):
        raise UserError(
            f"{where}: 'votes' must be indices of the responses, from 0 to {count - 1}, or null for none of "
            f"them, got {shown(values)}"
        )
    cast: Sequence[int] = [value for value in values if value is not None]
    return [cast.count(index) / max(len(cast), 1) for index in range(count)]


def _is_index(value: Any, count: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count)


def _is_number(value: Any) -> bool:
    # Not NaN either, which has no place in an order.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
