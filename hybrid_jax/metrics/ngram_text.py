"""An n-gram model with its vocabulary: probabilities of texts, by character or by word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from hybrid_jax.metrics.ngram_lm import NgramModel, Smoothing

Unit = Literal["character", "word"]

_UNKNOWN = 0  # the id of every token that the vocabulary lacks
_WORD_OR_MARK = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def split(text: str, unit: Unit) -> list[str]:
    """The tokens of a text: its characters, or its lower-case words and punctuation marks."""
    return list(text) if unit == "character" else _WORD_OR_MARK.findall(text.lower())


def vocabulary_of(texts: Iterable[str], unit: Unit) -> dict[str, int]:
    """Ids 1, 2, … of all tokens in their order; 0 stands for any other."""
    return {
        token: i for i, token in enumerate(sorted({t for text in texts for t in split(text, unit)}), start=1)
    }


@dataclass(frozen=True)
class NgramText:
    """``P(token | the tokens before it)`` of texts.

    An unknown token is one more token of the vocabulary that was never seen, so it is rare, not impossible.
    """

    unit: Unit
    vocabulary: Mapping[str, int]
    model: NgramModel

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        unit: Unit,
        context: int,
        smoothing: Smoothing = "kneser_ney",
        vocabulary: Mapping[str, int] | None = None,
    ) -> NgramText:
        """Trains on texts; models to be compared need one vocabulary, None takes that of the texts."""
        known = vocabulary_of(texts, unit) if vocabulary is None else vocabulary
        sequences = [_ids(text, unit, known) for text in texts]
        return cls(unit, known, NgramModel.train(sequences, len(known) + 1, context, smoothing))

    def log_probs(self, text: str) -> Float[np.ndarray, "T"]:
        """The log-probability of each token in nats, float64 [T]."""
        return self.model.log_probs(_ids(text, self.unit, self.vocabulary))


def _ids(text: str, unit: Unit, vocabulary: Mapping[str, int]) -> Int[np.ndarray, "T"]:
    return np.array([vocabulary.get(token, _UNKNOWN) for token in split(text, unit)], np.int64)
