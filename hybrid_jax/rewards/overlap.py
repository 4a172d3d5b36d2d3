"""Rewards that compare a response with the reference texts of its row, the column ``references``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Interval

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Natural, Order, Positive, settings
from hybrid_jax.metrics import overlap
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("bleu")
@settings
class Bleu:
    """BLEU of the response, in [0, 1]: sacrebleu's sentence level, smoothed, with effective order.

    Attributes:
        max_order: The longest n-gram.
        lowercase: Whether case is ignored.
        tokens: sacrebleu's tokenizer: 13a, intl, char, zh or none.
        smoothing: Of n-gram lengths without a match: exp, floor, add-k or none, see `overlap.sentence_bleu`.
    """

    max_order: Order = 4
    lowercase: bool = False
    tokens: overlap.BleuTokens = "13a"
    smoothing: overlap.BleuSmoothing = "exp"

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        settings = (self.max_order, self.lowercase, self.tokens, self.smoothing)
        return [overlap.sentence_bleu(text, known, *settings) for text, known in _rows(responses, references)]


@REWARDS.register("chrf")
@settings
class Chrf:
    """chrF of the response, in [0, 1]: F_beta of character n-grams (Popović 2015), by sacrebleu.

    Attributes:
        char_order: The longest n-gram of characters.
        word_order: The longest n-gram of words; 2 is chrF++.
        beta: How many times recall counts as much as precision.
    """

    char_order: Order = 6
    word_order: Annotated[int, Interval(ge=0, le=20)] = 0
    beta: Positive = 2.0

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        settings = (self.char_order, self.word_order, self.beta)
        return [overlap.sentence_chrf(text, known, *settings) for text, known in _rows(responses, references)]


@REWARDS.register("ter")
@settings
class Ter:
    """Minus TER: edits of words and shifts of phrases per reference word (Snover et al. 2006).

    0 at best, -1 for an empty response, unbounded below for one much longer than its reference.

    Attributes:
        max_words: Where the response or a reference has more words, phrases are not shifted and the score is
            minus the word error rate. The search for shifts takes far more than quadratic time: on unrelated
            texts of 20, 40 and 60 words 3, 40 and 240 ms a row.
    """

    max_words: Natural = 40

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return [
            -overlap.error_rate(text, known, self.max_words) for text, known in _rows(responses, references)
        ]


@REWARDS.register("rouge")
@settings
class Rouge:
    """ROUGE of the response, in [0, 1] (Lin 2004), by rouge-score; the best over the references.

    ``rougeLsum`` is what papers on summaries call ROUGE-L. Recall grows with length: it needs a limit beside
    it. Tokens are runs of a-z and 0-9, so that a text in another script scores 0; `chrf` reads any script.

    Attributes:
        variant: rouge1, rouge2, rougeL or rougeLsum.
        measure: f1, recall or precision.
        stemmer: Whether words are stemmed.
        max_words: rougeL and rougeLsum, of quadratic time, see the first so many words of each text.
    """

    variant: overlap.RougeVariant = "rougeL"
    measure: overlap.RougeMeasure = "f1"
    stemmer: bool = True
    max_words: Count = 1000

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        settings = (self.variant, self.measure, self.stemmer, self.max_words)
        return [overlap.rouge(text, known, *settings) for text, known in _rows(responses, references)]


@REWARDS.register("exact_match")
@settings
class ExactMatch:
    """1 if the response equals a reference, else 0.

    Attributes:
        normalise: Compare without case, ASCII punctuation, articles and extra spaces, as SQuAD does; else
            only white space around the texts is ignored.
    """

    normalise: bool = True

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return [
            overlap.exact_match(text, known, self.normalise) for text, known in _rows(responses, references)
        ]


@REWARDS.register("token_f1")
@settings
class TokenF1:
    """F1 of the words that the response shares with its best reference, in [0, 1], as SQuAD computes it."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return [overlap.token_f1(text, known) for text, known in _rows(responses, references)]


@REWARDS.register("edit_similarity")
@settings
class EditSimilarity:
    """``1 - Levenshtein distance / length of the longer text`` in characters, in [0, 1]; the best reference."""

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        return [overlap.edit_similarity(text, known) for text, known in _rows(responses, references)]


def accepted_texts(column: str, values: Sequence[Any]) -> list[list[str]]:
    """The accepted texts of each row: a list of at least one; a bare text counts as a list of it.

    Raises:
        UserError: A row has none, or something else than texts.
    """
    return [_texts(column, row, value) for row, value in enumerate(values)]


def _texts(column: str, row: int, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if texts is None or not hasattr(texts, "__len__") or len(texts) == 0:
        raise UserError(
            f"row {row} has no {column}; its column {column!r} must hold a list of texts, got {value!r}"
        )
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"row {row}: column {column!r} must hold a list of texts, got {text!r} in it")
    return list(texts)


def _rows(responses: Sequence[str], references: Sequence[Any]) -> zip[tuple[str, list[str]]]:
    return zip(responses, accepted_texts("references", references), strict=True)
