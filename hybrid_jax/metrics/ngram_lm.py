"""n-gram language models over any tokens: interpolated Kneser-Ney and Witten-Bell, in numpy.

The n-grams of each length are one sorted table of integers, so that training on a million tokens and scoring
take seconds, not minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Smoothing = Literal["kneser_ney", "witten_bell"]


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length and what they give to ``P(w | h)``.

    An n-gram's id is its place in ``keys``; its key is ``id of its context * vocab_size + last token``, where
    the context (all but the last token) is an n-gram of the level below. The empty context has id 0.
    """

    keys: Int[np.ndarray, "G"]  # int64, sorted
    shares: Float[np.ndarray, "G"]  # of the n-gram itself, after discounting
    backoffs: Float[np.ndarray, "H"]  # of each context: the weight of the level below

    def find(self, keys: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        """The id of each key, -1 where it is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


@dataclass(frozen=True)
class NgramModel:
    """``P(w | the last k tokens)`` for tokens 0 .. V-1, by `train`; every token has a probability above 0.

    At the start of a sequence, where fewer than k tokens are known, the context is what there is.

    Attributes:
        vocab_size: V.
        levels: One for each context length 0 .. k.
    """

    vocab_size: int
    levels: tuple[_Level, ...]

    @classmethod
    def train(
        cls,
        sequences: Sequence[Sequence[int] | Int[np.ndarray, "T"]],
        vocab_size: int,
        context: int,
        smoothing: Smoothing = "kneser_ney",
        discount: float | None = None,
        uniform_share: float | None = None,
    ) -> NgramModel:
        """Counts and smooths.

        Kneser-Ney, interpolated: ``P(w|h) = max(c(hw) - D, 0) / N(h) + D T(h) / N(h) P(w|h')``, where h' is h
        without its first token, T(h) the number of different w after h, and below the longest context c(hw)
        is the number of different tokens seen before hw (Kneser and Ney 1995; Chen and Goodman 1998, eq. 24).
        Witten-Bell: ``P(w|h) = (c(hw) + T(h) P(w|h')) / (N(h) + T(h))``.
        Without context: ``(1 - s) c(w) / N + s / V``, s the ``uniform_share``.

        Args:
            sequences: Token ids; no n-gram reaches over a boundary. Begin and end marks are yours to add.
            vocab_size: V.
            context: k, the number of tokens that a probability depends on; the order of the model less 1.
            smoothing: Which of the two.
            discount: D of Kneser-Ney in [0, 1]; None estimates ``n1 / (n1 + 2 n2)`` at each length from the
                numbers of n-grams with count 1 and 2 (0.5 where none has count 1).
            uniform_share: s in [0, 1]; None is ``T / (N + T)`` for T different of N tokens, 1 for no tokens.

        Raises:
            ValueError: A setting is out of range, or a token is.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
        if context < 0:
            raise ValueError(f"context must be at least 0 tokens, got {context}")
        if smoothing not in ("kneser_ney", "witten_bell"):
            raise ValueError(f"smoothing must be kneser_ney or witten_bell, got {smoothing!r}")
        for name, value in (("discount", discount), ("uniform_share", uniform_share)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        tokens, positions = _joined(sequences, vocab_size)
        tables, ids = _tables(tokens, positions, vocab_size, context)
        levels = []
        for length, keys in enumerate(tables):
            if smoothing == "kneser_ney" and length < context:
                counts = _continuations(ids[length], ids[length + 1], len(keys))
            else:
                counts = np.bincount(ids[length][ids[length] >= 0], minlength=len(keys))
            contexts = len(tables[length - 1]) if length else 1
            if length == 0:
                levels.append(_unigrams(keys, counts, uniform_share))
            elif smoothing == "kneser_ney":
                levels.append(_kneser_ney(keys, counts, keys // vocab_size, contexts, discount))
            else:
                levels.append(_witten_bell(keys, counts, keys // vocab_size, contexts))
        return cls(vocab_size, tuple(levels))

    @property
    def context(self) -> int:
        """k, the number of tokens that a probability depends on."""
        return len(self.levels) - 1

    def log_probs(self, tokens: Sequence[int] | Int[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
        """``log P(token t | tokens before)`` in nats, float64 [T]: each from its last k tokens only."""
        joined, positions = _joined([tokens], self.vocab_size)
        probabilities = np.full(len(joined), 1 / self.vocab_size)
        contexts = np.zeros(len(joined), np.int64)  # of each token: the id of what stands before it, or -1
        for length, level in enumerate(self.levels):
            known = contexts >= 0
            ids = np.where(known, level.find(contexts * self.vocab_size + joined), -1)
            share = np.where(ids >= 0, _at(level.shares, ids), 0.0)
            backoff = np.where(known, _at(level.backoffs, contexts), 1.0)
            probabilities = share + backoff * probabilities
            contexts = np.where(positions > length, np.roll(ids, 1), -1)
        return np.log(probabilities)


def _joined(sequences: Sequence, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in a row, and the place of each within its sequence."""
    arrays = [np.asarray(sequence, np.int64).reshape(-1) for sequence in sequences]
    tokens = np.concatenate([np.zeros(0, np.int64), *arrays])
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(f"tokens must be in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
    return tokens, np.concatenate([np.zeros(0, np.int64), *(np.arange(len(array)) for array in arrays)])


def _tables(
    tokens: np.ndarray, positions: np.ndarray, vocab_size: int, context: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each length the sorted keys, and for each token the id of the n-gram that it ends, -1 for none."""
    tables, ids = [], []
    contexts = np.zeros(len(tokens), np.int64)
    for length in range(context + 1):
        complete = positions >= length
        keys, found = np.unique(contexts[complete] * vocab_size + tokens[complete], return_inverse=True)
        tables.append(keys)
        ids.append(np.full(len(tokens), -1))
        ids[-1][complete] = found
        contexts = np.roll(ids[-1], 1)
    return tables, ids


def _continuations(ids: np.ndarray, longer: np.ndarray, size: int) -> np.ndarray:
    """For each n-gram the number of different tokens seen before it: of the longer n-grams that end in it."""
    _, examples = np.unique(longer, return_index=True)  # one place for each longer n-gram
    examples = examples[longer[examples] >= 0]
    return np.bincount(ids[examples], minlength=size)


def _unigrams(keys: np.ndarray, counts: np.ndarray, uniform_share: float | None) -> _Level:
    total, types = counts.sum(), np.count_nonzero(counts)
    if total == 0:
        return _Level(keys, np.zeros(len(keys)), np.ones(1))
    share = types / (total + types) if uniform_share is None else uniform_share
    return _Level(keys, (1 - share) * counts / total, np.array([share]))


def _kneser_ney(
    keys: np.ndarray, counts: np.ndarray, contexts: np.ndarray, num_contexts: int, discount: float | None
) -> _Level:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    if discount is None:
        discount = once / (once + 2 * twice) if once else 0.5
    totals, types = _sums(counts, contexts, num_contexts)
    shares = np.maximum(counts - discount, 0) / np.maximum(totals[contexts], 1)
    backoffs = np.where(totals > 0, discount * types / np.maximum(totals, 1), 1.0)
    return _Level(keys, shares, backoffs)


def _witten_bell(keys: np.ndarray, counts: np.ndarray, contexts: np.ndarray, num_contexts: int) -> _Level:
    totals, types = _sums(counts, contexts, num_contexts)
    whole = np.maximum(totals + types, 1)
    return _Level(keys, counts / whole[contexts], np.where(totals > 0, types / whole, 1.0))


def _sums(counts: np.ndarray, contexts: np.ndarray, num_contexts: int) -> tuple[np.ndarray, np.ndarray]:
    """For each context the sum of its counts N(h), and how many are above 0, T(h)."""
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
    return totals, np.bincount(contexts, weights=counts > 0, minlength=num_contexts)


def _at(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``values[places]``; anything where the place is -1."""
    return values[places] if len(values) else np.zeros(len(places))
