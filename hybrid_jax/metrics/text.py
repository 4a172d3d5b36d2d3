"""Measures of generated text, shared by rewards and by evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, zip_longest

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# A sentence ends at . ! ? (and what closes a quotation) before white space, at a mark of Chinese or Japanese,
# or at the end of a line; not after an initial or a title.
_END = re.compile(
    r"(?:(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\bProf)(?<!\bvs)(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z])\."
    r"|(?<![!?…])[!?…]+)['\"”’)\]]*(?=\s)|[。！？]+[」』”’]*|\n"
)


def words(text: str) -> list[str]:
    """The lower-cased words of ``text``, without punctuation; ``isn't`` is one word."""
    return _WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """The sentences of ``text`` in order, without white space around them; their marks stay.

    A rule, not a model: ``.``, ``!`` or ``?`` before white space, or a new line, ends a sentence, except
    after an initial and a few titles. A text without marks is one sentence; an empty one has none.
    """
    starts = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    parts = (text[first:last].strip() for first, last in pairwise(starts))
    return [part for part in parts if part]


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` neighbours, in order; none when there are fewer items."""
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def repetition_rate(text: str, n: int = 2) -> float:
    """Share of the word n-grams of one text that it has used before: ``1 - distinct / all``.

    Returns:
        A number in [0, 1); 0 for a text of fewer than n words.
    """
    grams = ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams of all texts together, divided by their number (Li et al. 2016, "distinct-n").

    Returns:
        A number in [0, 1], small when the texts resemble each other; 0 when there is no n-gram at all.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_length(texts: Sequence[str]) -> float:
    """Mean number of words of a text; 0 for no texts."""
    return sum(len(words(text)) for text in texts) / len(texts) if texts else 0.0


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a corpus in [0, 100], as sacrebleu computes it (13a tokens, exponential smoothing).

    n-gram counts are summed over the corpus before they are divided, so this is not the mean over sentences
    (Papineni et al. 2002; signature of Post 2018).

    Args:
        hypotheses: B generated texts.
        references: For each of them its accepted texts, at least one; the numbers may differ.

    Raises:
        ValueError: The lengths differ, a hypothesis has no reference, or references are bare texts.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(hypotheses) != len(references) or not hypotheses:
        got = f"{len(references)} for {len(hypotheses)} hypotheses"
        raise ValueError(f"references must hold one list for each of one or more hypotheses, got {got}")
    if any(isinstance(accepted, str) or not accepted for accepted in references):
        raise ValueError(
            "references must be a list of at least one text for each hypothesis, got a bare text or none"
        )
    # sacrebleu wants the transpose: stream i holds the i-th reference of each hypothesis, or None.
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(BLEU().corpus_score(list(hypotheses), streams).score)
