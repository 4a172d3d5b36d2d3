"""Rewards for mentioning what was asked for: the concepts of a row, or the keywords of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.metrics.coverage import concept_recall
from hybrid_jax.metrics.text import words
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.overlap import accepted_texts
from hybrid_jax.rewards.verifiable import column_of


@REWARDS.register("concept_coverage")
@settings
class ConceptCoverage:
    """Share of the concepts of a row that the response mentions in any inflection, in [0, 1].

    As in CommonGen (Lin et al. 2020): ``dogs`` and ``catching`` mention the concepts ``dog`` and ``catch``.
    The stems are Porter's for English; other words must occur as they are. A phrase must occur as a whole.

    Attributes:
        column: The column with a list of words or phrases for each row.
        max_words: Only the first so many words of the response count, so that length does not pay; None
            counts all.
    """

    column: str = "concepts"
    max_words: Count | None = None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        rows = accepted_texts(self.column, column_of(columns, self.column))
        for row, concepts in enumerate(rows):
            if not any(map(words, concepts)):
                raise UserError(f"row {row} has no concepts; column {self.column!r} holds {concepts}")
        pairs = zip(responses, rows, strict=True)
        return [concept_recall(response, concepts, self.max_words) for response, concepts in pairs]


@REWARDS.register("keyword_coverage")
@settings
class KeywordCoverage:
    """Share of the keywords that the response mentions in any inflection, in [0, 1]; the same for all rows.

    Attributes:
        keywords: Words or phrases, see `ConceptCoverage`.
        max_words: Only the first so many words of the response count; None counts all.
    """

    keywords: tuple[str, ...]
    max_words: Count | None = None

    def __post_init__(self) -> None:
        if not any(map(words, self.keywords)):
            raise ValueError(f"keywords must hold at least one word, got {list(self.keywords)}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [concept_recall(response, self.keywords, self.max_words) for response in responses]
