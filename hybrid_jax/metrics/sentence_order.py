"""A discriminator of sentence order: it tells a text from its own sentences in another order.

    s(text) = (b · g(y_1) + Σ_i a · f(y_i, y_i+1)) / S        P(true before permuted) = σ(s(true) − s(permuted))

The features f of neighbours are the transitions of an entity grid (Barzilay & Lapata 2008) whose entities are
the content words, in four classes of how often the text names them; a year that follows an earlier one; and
which words the two sentences begin with. Those of the first sentence, g, are its words and whether it refers
back. a and b are learnt by logistic regression on texts and permutations of them.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hybrid_jax.metrics.text import sentences, words

_HASHED = 2**13  # weights of openings; openings of the same hash share one
_GRID = 8  # weights of the entity grid and of years, before those
_STOP = frozenset(
    words("""
    the and for that with this from was were are but not have has had his her its their they them she
    him you your our who which what when where there here then than also into onto over under about
    after before been being will would can could should may might must all any some such one two out off
    very more most only just because while during did does doing done get got how why each other another
    these those
""")
)
_BACK = frozenset(
    words("""
    he she it they them him her his hers its their this these those such also however then but so
""")
)
_YEAR = re.compile(r"\b1[0-9]{3}\b|\b20[0-9]{2}\b")
_STEPS = 150  # of gradient descent over all pairs of orders


@dataclass(frozen=True)
class SentenceOrder:
    """The weights of the features: of a text's neighbours, then of its first sentence."""

    weights: np.ndarray

    def order_probability(self, text: str, permutations: int = 10, max_sentences: int = 40) -> float:
        """The mean probability that the text stands before permutations of its sentences, in (0, 1).

        A half where no order is better than another: of one sentence, or of the same one again and again.
        The permutations depend on the number of sentences alone.
        """
        said = sentences(text)[:max_sentences]
        if len(said) < 2:
            return 0.5
        table = _Table(said)
        own = self._score(table, range(len(said)))
        others = [self._score(table, order) for order in _orders(len(said), permutations, 0)]
        return float(np.mean(1.0 / (1.0 + np.exp(np.subtract(others, own)))))

    def _score(self, table: _Table, order: Sequence[int]) -> float:
        index, value = table.features(order)
        return float(self.weights[index] @ value)


def train_order(
    texts: Sequence[str], permutations: int = 10, max_sentences: int = 40, penalty: float = 1e-3
) -> SentenceOrder:
    """Learns from texts of at least two sentences; others are left out.

    Args:
        texts: in their true order.
        permutations: of each text.
        max_sentences: of a text that are read.
        penalty: on the squares of the weights.

    Raises:
        ValueError: no text has two sentences.
    """
    rows, columns, values, count = [], [], [], 0
    for number, text in enumerate(texts):
        said = sentences(text)[:max_sentences]
        if len(said) < 2:
            continue
        table = _Table(said)
        own = table.features(range(len(said)))
        for order in _orders(len(said), permutations, number + 1):
            for sign, (index, value) in ((1.0, own), (-1.0, table.features(order))):
                rows.append(np.full(len(index), count))
                columns.append(index)
                values.append(sign * value)
            count += 1
    if not count:
        raise ValueError("no text has two sentences")
    row, column, value = (np.concatenate(x) for x in (rows, columns, values))
    size = 2 * (_GRID + _HASHED)
    weights, squares = np.zeros(size), np.full(size, 1e-8)
    for _ in range(_STEPS):
        margin = np.bincount(row, value * weights[column], count)
        slope = 1.0 / (1.0 + np.exp(margin))  # of the logistic loss
        gradient = penalty * weights - np.bincount(column, value * slope[row], size) / count
        squares += gradient**2
        weights -= 0.5 * gradient / np.sqrt(squares)  # AdaGrad
    return SentenceOrder(weights)


class _Table:
    """The features of every two sentences of a text, found once for all orders."""

    def __init__(self, said: Sequence[str]):
        self._said = [words(sentence) for sentence in said]
        self._entities = [{_entity(w) for w in row if len(w) > 2 and w not in _STOP} for row in self._said]
        self._times = Counter(entity for row in self._entities for entity in row)
        self._years = [[int(year) for year in _YEAR.findall(sentence)] for sentence in said]
        self._pairs: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self._firsts = [self._first(i) for i in range(len(said))]

    def features(self, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of the features of an order."""
        index, value = [*self._firsts[order[0]][0]], [*self._firsts[order[0]][1]]
        for pair in pairwise(order):
            if pair not in self._pairs:
                self._pairs[pair] = self._neighbours(*pair)
            found = self._pairs[pair]
            index += found[0]
            value += found[1]
        return np.array(index), np.array(value) / len(self._said)

    def _neighbours(self, i: int, j: int) -> tuple[list[int], list[float]]:
        shared = self._entities[i] & self._entities[j]
        grid = [0.0] * _GRID
        for entity in shared:
            grid[min(self._times[entity], 5) - 2] += 1.0
        size = max(1.0, (len(self._entities[i]) * len(self._entities[j])) ** 0.5)
        grid = [x / size for x in grid]
        grid[4] = float(bool(shared))
        if self._years[i] and self._years[j]:
            grid[5] = float(np.sign(self._years[j][0] - self._years[i][-1]))
        grid[6] = float(bool(shared & {_entity(w) for w in self._said[j][:4]}))
        grid[7] = float(any(w in _BACK for w in self._said[j][:2]) and len(self._said[i]) > len(self._said[j]))
        index = [*range(_GRID)]
        for one in _openings(self._said[i]):
            index += [_GRID + _hash(f"{one}|{other}") for other in _openings(self._said[j])]
        return index, grid + [1.0] * (len(index) - _GRID)

    def _first(self, i: int) -> tuple[list[int], list[float]]:
        row, start = self._said[i], _GRID + _HASHED
        back = sum(w in _BACK for w in row[:3])
        known = [self._times[entity] for entity in self._entities[i]]
        plain = [float(back), len(row) / 20, float(np.mean(known)) if known else 0.0]
        index = [start + k for k in range(3)]
        index += [start + _GRID + _hash(w) for w in [*_openings(row), *{f"in {w}" for w in row}]]
        return index, plain + [1.0] * (len(index) - 3)


def _openings(row: Sequence[str]) -> Iterator[str]:
    yield " ".join(row[:1])
    yield " ".join(row[:2])


def _entity(word: str) -> str:
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "replace")) % _HASHED


def _orders(size: int, count: int, seed: int) -> list[list[int]]:
    """Orders of the sentences, none of them the true one."""
    random, true = np.random.default_rng((seed, size)), list(range(size))
    orders = []
    while len(orders) < count:
        if (order := random.permutation(size).tolist()) != true:
            orders.append(order)
    return orders
