"""Retrieval of texts by their words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hybrid_jax.metrics.text import words

_K1, _B = 1.5, 0.75  # how soon a repeated word counts no more, and how much a long text is discounted


class BM25:
    """Texts ranked for a query.

        score = Σ_w idf(w) · f (k₁ + 1) / (f + k₁ (1 − b + b · length / mean length))
        idf(w) = ln(1 + (N − n + ½) / (n + ½))

    f is how often the word w of the query stands in a text, n in how many of the N texts; k₁ = 1.5, b = 0.75.
    Source: Robertson and Zaragoza 2009, with the idf that is never negative.
    """

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        self._counts = [Counter(words(text)) for text in texts]
        self._lengths = [sum(counts.values()) for counts in self._counts]
        self._mean = max(sum(self._lengths) / max(len(texts), 1), 1e-9)
        self._holds: dict[str, list[int]] = {}
        for number, counts in enumerate(self._counts):
            for word in counts:
                self._holds.setdefault(word, []).append(number)

    def search(self, query: str, count: int) -> list[str]:
        """The ``count`` texts with the highest scores, best first; none without a word of the query."""
        scores: dict[int, float] = {}
        for word in set(words(query)):
            holds = self._holds.get(word, [])
            idf = math.log(1 + (len(self.texts) - len(holds) + 0.5) / (len(holds) + 0.5))
            for number in holds:
                f, length = self._counts[number][word], self._lengths[number] / self._mean
                gain = idf * f * (_K1 + 1) / (f + _K1 * (1 - _B + _B * length))
                scores[number] = scores.get(number, 0.0) + gain
        best = sorted(scores, key=lambda number: (-scores[number], number))[:count]
        return [self.texts[number] for number in best]
