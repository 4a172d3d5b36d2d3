"""How much a text agrees with reference texts: BLEU, chrF, TER, ROUGE, exact match, token F1, edit similarity.

All are for one text and one or more references, the best of which counts; all but `error_rate` are in
[0, 1]. BLEU, chrF and TER are those of sacrebleu, ROUGE is that of rouge-score.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, Literal

from hybrid_jax.metrics.packages import import_package
from hybrid_jax.metrics.text import sentences

RougeVariant = Literal["rouge1", "rouge2", "rougeL", "rougeLsum"]
RougeMeasure = Literal["f1", "recall", "precision"]
BleuTokens = Literal["13a", "intl", "char", "zh", "none"]
BleuSmoothing = Literal["exp", "floor", "add-k", "none"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def sentence_bleu(
    text: str,
    references: Sequence[str],
    max_order: int = 4,
    lowercase: bool = False,
    tokens: BleuTokens = "13a",
    smoothing: BleuSmoothing = "exp",
) -> float:
    """BLEU of one sentence in [0, 1]: sacrebleu with smoothing and effective order.

    Effective order leaves out the n-gram lengths that the text is too short for, so that a copy of a short
    reference scores 1. The mean over sentences is not the BLEU of a corpus (`metrics.text.corpus_bleu`).

    Args:
        text: The candidate.
        references: Accepted texts; n-grams may come from any, the length is compared with the closest.
        max_order: The longest n-gram.
        lowercase: Whether case is ignored.
        tokens: sacrebleu's tokenizer; ``char`` or ``zh`` for Chinese.
        smoothing: What stands for an n-gram length without a match: ``exp`` 1/2, 1/4, .. of one, ``floor`` a
            tenth of one; ``add-k`` counts one n-gram more at each length above 1; with ``none`` the score is 0.
    """
    return _bleu(max_order, lowercase, tokens, smoothing).sentence_score(text, list(references)).score / 100


def sentence_chrf(
    text: str, references: Sequence[str], char_order: int = 6, word_order: int = 0, beta: float = 2.0
) -> float:
    """chrF of one sentence in [0, 1] (Popović 2015), F_beta of n-grams; ``word_order=2`` is chrF++."""
    return _chrf(char_order, word_order, beta).sentence_score(text, list(references)).score / 100


def error_rate(text: str, references: Sequence[str], max_words: int = 40) -> float:
    """TER (Snover et al. 2006): edits of words and shifts of phrases per reference word; 0 at best, unbounded.

    The search for shifts takes more than quadratic time. Where the text or a reference has more than
    ``max_words`` words, phrases are not shifted: the word error rate, which is never less than TER.
    """
    longest = max(len(one.split()) for one in (text, *references))
    if longest <= max_words:
        return _ter().sentence_score(text, list(references)).score / 100
    counts = [len(reference.split()) for reference in references]
    edits = min(edit_distance(text.lower().split(), reference.lower().split()) for reference in references)
    mean = sum(counts) / len(counts)
    return edits / mean if mean else 1.0


def rouge(
    text: str,
    references: Sequence[str],
    variant: RougeVariant = "rougeL",
    measure: RougeMeasure = "f1",
    stemmer: bool = True,
    max_words: int = 1000,
) -> float:
    """ROUGE in [0, 1] (Lin 2004), the best over the references.

    ``rougeLsum``, which papers on summaries call ROUGE-L, matches sentence by sentence; the sentences are
    those of `metrics.text.sentences`. The tokens are runs of a-z and 0-9: a text in another script scores 0.

    Args:
        text: The candidate.
        references: Accepted texts.
        variant: rouge1 and rouge2 count n-grams; rougeL and rougeLsum the longest common subsequence.
        measure: f1, recall or precision.
        stemmer: Whether words are stemmed (Porter).
        max_words: The two of quadratic time see the first so many words of each text only.
    """
    scorer = _rouge(variant, stemmer)
    prepare = functools.partial(_prepared, variant=variant, max_words=max_words)
    candidate = prepare(text)
    scores = [scorer.score(prepare(reference), candidate)[variant] for reference in references]
    return max(float(getattr(score, "fmeasure" if measure == "f1" else measure)) for score in scores)


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, the articles a, an, the, and extra spaces (SQuAD's convention)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(text: str, references: Sequence[str], normalise: bool = True) -> float:
    """1 if the text equals a reference, else 0; after `normalise_answer`, or but for spaces around it."""
    clean = normalise_answer if normalise else str.strip
    return float(clean(text) in {clean(reference) for reference in references})


def token_f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words shared with a reference, after `normalise_answer` (Rajpurkar et al. 2016).

    Words are counted as often as they occur; the best reference counts; two empty texts agree.
    """
    return max(_pair_f1(normalise_answer(text).split(), normalise_answer(one).split()) for one in references)


def edit_similarity(text: str, references: Sequence[str]) -> float:
    """``1 - edits / length of the longer`` in characters, in [0, 1], the best over the references."""
    return max(
        1.0 - edit_distance(text, one) / max(len(text), len(one)) if text or one else 1.0 for one in references
    )


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of single items.

    One column of the table is two integers of one bit a row, the differences of neighbours (Myers 1999, in
    the form of Hyyrö 2003, section 4): two texts of 100,000 characters take seconds.
    """
    rows, columns = (first, second) if len(first) >= len(second) else (second, first)
    if not columns:
        return len(rows)
    where: dict[Hashable, int] = {}
    for row, item in enumerate(rows):
        where[item] = where.get(item, 0) | 1 << row
    every, last = (1 << len(rows)) - 1, 1 << (len(rows) - 1)
    up, down, distance = every, 0, len(rows)  # rows where the column's value rises, falls by 1
    for item in columns:
        equal = where.get(item, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        rises, falls = down | ~(diagonal | up), up & diagonal  # against the column before
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & every, (falls << 1) & every
        up, down = (falls | ~(diagonal | rises)) & every, rises & diagonal
    return distance


def _pair_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _prepared(text: str, variant: RougeVariant, max_words: int) -> str:
    if variant in ("rouge1", "rouge2"):
        return text
    parts, left = [], max_words
    for sentence in sentences(text) if variant == "rougeLsum" else [text]:
        kept = sentence.split()[:left]
        parts.append(" ".join(kept))
        left -= len(kept)
    return "\n".join(part for part in parts if part)


@functools.cache
def _bleu(max_order: int, lowercase: bool, tokens: BleuTokens, smoothing: BleuSmoothing) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(
        effective_order=True,
        max_ngram_order=max_order,
        lowercase=lowercase,
        tokenize=tokens,
        smooth_method=smoothing,
    )


@functools.cache
def _chrf(char_order: int, word_order: int, beta: float) -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(char_order=char_order, word_order=word_order, beta=beta)  # type: ignore[arg-type]  # any number


@functools.cache
def _ter() -> Any:
    from sacrebleu.metrics.ter import TER

    return TER()


@functools.cache
def _rouge(variant: RougeVariant, stemmer: bool) -> Any:
    module = import_package("rouge_score.rouge_scorer", "ROUGE")
    return module.RougeScorer([variant], use_stemmer=stemmer)
