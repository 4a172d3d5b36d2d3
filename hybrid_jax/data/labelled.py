"""Texts with labels: rows for a classifier, in batches of like length whose whole state is a cursor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.data.places import places_of, some_of
from hybrid_jax.data.scored_text import padded
from hybrid_jax.data.sources import SOURCES, Jsonl

log = logging.getLogger(__name__)

LENGTH_STEP = 32  # rows are padded to this times a power of two
MOST_NUMBER = 3.4e38  # of float32
BLOCKS = 50  # batches whose rows are sorted by length together


@SOURCES.register("labelled")
@settings(kw_only=True)
class Labelled(Jsonl):
    """JSON lines with a text and its label, as `Jsonl`; by default there is no prompt.

    Attributes:
        replace: what to write in place of what in the texts, such as line breaks for ``<br />``.
    """

    prompt_field: str | None = None
    response_field: str | None = "text"
    replace: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if "" in self.replace:
            raise ValueError("replace must name texts of at least one letter, got ''")

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """Makes an example of a row, with the replacements done."""
        example = super().example(row, where)
        response = None if example.response is None else self._replaced(example.response)
        return replace(example, prompt=self._replaced(example.prompt), response=response)

    def _replaced(self, text: str) -> str:
        for old, new in self.replace.items():
            text = text.replace(old, new)
        return text


@struct.dataclass
class LabelledBatch:
    """Rows with what to predict of each: tokens, or the features that a frozen body makes of them."""

    tokens: Int[Array, "B T"] | None
    mask: Bool[Array, "B T"] | None
    targets: Int[Array, "B"] | Float[Array, "B"]  # a label, or a number
    features: Float[Array, "B F"] | None = None


def targets_of(examples: Sequence[Example], label_field: str, labels: Sequence[str]) -> np.ndarray:
    """The column ``label_field`` as int32 [B], the number of a label; of a single label float32 [B], a number.

    Raises:
        UserError: a row has no such column, or its value is no label: a number from 0, or a name.
    """
    read = _number if len(labels) == 1 else _label
    found = []
    places = places_of(examples)
    for place, example in zip(places, examples, strict=True):
        if label_field not in example.columns:
            near = suggest(label_field, list(example.columns))
            raise UserError(f"{place}: no column {label_field!r} with the label; {near}")
        if example.response is None:
            raise UserError(f"{place}: no text; set response_field")
        found.append(read(example.columns[label_field], labels, f"{place}: {label_field}"))
    if empty := some_of([not (example.response or "").strip() for example in examples], places):
        log.warning("%s have an empty text", empty)
    return np.array(found, np.float32 if len(labels) == 1 else np.int32)


def _label(value: Any, labels: Sequence[str], what: str) -> int:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value in range(len(labels)):  # also 1.0, as some files write it
        return int(value)
    raise UserError(f"{what} must be a name among {', '.join(labels)} or its number from 0, got {value!r}")


def _number(value: Any, labels: Sequence[str], what: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) < MOST_NUMBER:
        return float(value)
    raise UserError(f"{what} must be a finite number of 32 bits, got {value!r}")


class LabelledStream:
    """Endless batches of labelled rows; ``batch(cursor, size)`` is a function of (data, seed, cursor) alone.

    An epoch is as many whole batches as there are, in an order drawn from (seed, epoch): rows are shuffled,
    sorted by length within stretches of 50 batches, and the batches shuffled. The few rows left over wait for
    another epoch. The cursor counts rows and grows by ``size`` a batch.

    Args:
        rows: int32 [T] each.
        targets: of each row.
        seed: of the order, at least 0.
        limit: columns of a batch at most.
    """

    def __init__(
        self, rows: Sequence[np.ndarray], targets: np.ndarray, seed: int = 0, limit: int | None = None
    ):
        self.rows, self.targets = rows, targets
        self._limit = limit
        self._order = lru_cache(maxsize=2)(partial(_epoch, np.array([len(row) for row in rows]), seed))

    def chosen(self, cursor: int, size: int) -> np.ndarray:
        """The indices of the rows in a batch."""
        batches = len(self.rows) // size
        if batches == 0:
            raise UserError(f"batch_size must be at most the {len(self.rows)} rows of the data, got {size}")
        epoch, place = divmod(cursor // size, batches)
        return self._order(epoch, size)[place]

    def batch(self, cursor: int, size: int, features: np.ndarray | None = None) -> LabelledBatch:
        """Makes a batch of rows; where ``features`` [N F] are given, they take the place of tokens."""
        chosen = self.chosen(cursor, size)
        make: Any = LabelledBatch  # pyright does not see the fields of a flax.struct.dataclass
        if features is not None:
            return make(tokens=None, mask=None, targets=self.targets[chosen], features=features[chosen])
        tokens, mask = padded([self.rows[i] for i in chosen], LENGTH_STEP, self._limit)
        return make(tokens=tokens, mask=mask, targets=self.targets[chosen])


def _epoch(lengths: np.ndarray, seed: int, epoch: int, size: int) -> np.ndarray:
    """The rows of each batch of an epoch, [batches, size]."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(lengths))[: len(lengths) // size * size]
    for start in range(0, len(order), BLOCKS * size):
        stretch = order[start : start + BLOCKS * size]
        order[start : start + BLOCKS * size] = stretch[np.argsort(lengths[stretch], kind="stable")]
    return generator.permutation(order.reshape(-1, size))
