"""How much of what was asked for a text mentions, whatever the inflection."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hybrid_jax.metrics.packages import import_package
from hybrid_jax.metrics.text import words

_LONGEST_WORD = 50  # characters; what is longer is no word, and would take long to stem


def concept_recall(text: str, concepts: Sequence[str], max_words: int | None = None) -> float:
    """Share of the different concepts that ``text`` mentions, in [0, 1].

    A concept is a word or phrase; it is mentioned where its words, stemmed by Porter's rules for English,
    follow one another. As a function of the sentences of a text it is monotone and submodular (a set cover),
    and repeating a sentence adds nothing.

    Args:
        text: What is measured.
        concepts: At least one with a word in it; of equal ones only one counts.
        max_words: Only the first so many words of the text count, so that length does not pay.

    Raises:
        ValueError: No concept has a word.
    """
    wanted = {stems for concept in concepts if (stems := tuple(map(_stem, words(concept))))}
    if not wanted:
        raise ValueError(f"concepts must hold at least one word, got {list(concepts)}")
    stems = [_stem(word) for word in words(text)[:max_words]]
    sizes = {len(concept) for concept in wanted}
    found = {tuple(stems[i : i + size]) for size in sizes for i in range(len(stems) - size + 1)}
    return len(wanted & found) / len(wanted)


@functools.lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return word if len(word) > _LONGEST_WORD else _stemmer().stem(word)


@functools.cache
def _stemmer() -> Any:
    return import_package("nltk.stem.porter", "stemming").PorterStemmer()
