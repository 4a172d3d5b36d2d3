"""Rewards on texts that need no model: facts, sentiment, length, repetition, variety."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Natural, Positive, Share, settings
from hybrid_jax.metrics.text import distinct_n, repetition_rate, words
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("fact_coverage")
@settings
class FactCoverage:
    """Share of the facts of a row that its response states.

    A fact is a list of accepted phrases and is stated when one of them occurs, at word boundaries and in any
    case. The column ``facts`` holds for each row a mapping ``slot -> phrases`` or a list of such lists. The
    optional column ``contradictions`` has the same form and slots: phrases of other values. A stated fact
    that is also contradicted loses ``contradiction_penalty``, so that naming every value does not pay.

    For memory the fact is one that was told long before it is asked for, and other facts that were told are its
    contradictions. Range [0, 1]; an empty response scores 0.

    Raises:
        UserError: A row has no facts.
    """

    contradiction_penalty: Share = 1.0  # what a fact loses that is stated and contradicted
    soft: bool = (
        False  # of a fact that is not stated whole, the share of a phrase's words counts, the best one's
    )

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        facts: Sequence[Any],
        contradictions: Sequence[Any] | None = None,
    ) -> list[float]:
        others = contradictions or [None] * len(responses)
        return [self._score(*row) for row in zip(responses, facts, others, strict=True)]

    def _score(self, response: str, facts: Any, contradictions: Any) -> float:
        wanted, unwanted = _phrases_by_slot(facts), _phrases_by_slot(contradictions)
        if not wanted:
            raise UserError("a row has no facts; its column 'facts' must map slots to lists of phrases")
        score = 0.0
        for slot, phrases in wanted.items():
            stated = float(mentions(response, phrases)) or self.soft * _best_share(response, phrases)
            score += stated * (1.0 - self.contradiction_penalty * mentions(response, unwanted.get(slot, ())))
        return score / len(wanted)


def _best_share(response: str, phrases: Sequence[str]) -> float:
    """The largest share of the words of a phrase that the response has, as often as the phrase has them."""
    said, wanted = Counter(words(response)), [Counter(words(phrase)) for phrase in phrases]
    return max(((said & phrase).total() / phrase.total() for phrase in wanted if phrase), default=0.0)


@REWARDS.register("lexicon_sentiment")
@settings
class LexiconSentiment:
    """VADER's compound valence of the response, in [-1, 1]; 0 for an empty one.

    Hutto and Gilbert 2014. A word list with rules for negation and emphasis: a weak judge (70.5 % on film
    reviews), easily flattered by repeated praise; add `repetition` beside it.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [_sentiment_analyser().polarity_scores(response)["compound"] for response in responses]


@REWARDS.register("length")
@settings
class Length:
    """``-max(0, |n - target| - tolerance) / scale`` for a response of n words: 0 at best, unbounded below.

    Attributes:
        target: Wanted number of words.
        tolerance: Words more or fewer that cost nothing.
        scale: Words off that cost 1; None is the target.
        unit: What is counted instead of words: ``characters``, for scripts without spaces. For tokens there
            is `token_length`.
    """

    target: Count
    tolerance: Natural = 0
    scale: Positive | None = None
    unit: Literal["words", "characters"] = "words"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        scale = self.target if self.scale is None else self.scale
        count = len if self.unit == "characters" else _num_words
        excess = [max(0, abs(count(response) - self.target) - self.tolerance) for response in responses]
        return [-off / scale for off in excess]


@REWARDS.register("repetition")
@settings
class Repetition:
    """Minus the share of the response's word n-grams that repeat an earlier one, in (-1, 0]."""

    n: Count = 2  # words of an n-gram

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [-repetition_rate(response, self.n) for response in responses]


@REWARDS.register("distinct")
@settings
class Distinct:
    """Distinct-n of one response: its different word n-grams over all of them (Li et al. 2016), in [0, 1].

    0 for a response of fewer than n words, where `repetition`, which is ``distinct - 1`` elsewhere, gives 0,
    its best. Falls with length for any text.
    """

    n: Count = 2  # words of an n-gram

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [distinct_n([response], self.n) for response in responses]


def mentions(text: str, phrases: Sequence[str]) -> bool:
    """Tells whether one of the phrases occurs in ``text``: at word boundaries, in any case and spacing."""
    return bool(phrases) and _phrase_pattern(tuple(phrases)).search(text) is not None


@functools.lru_cache(maxsize=8192)
def _phrase_pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = [r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})(?!\w)", re.IGNORECASE)


def _num_words(text: str) -> int:
    return len(words(text))


def _phrases_by_slot(facts: Any) -> dict[Any, Sequence[str]]:
    slots = facts if isinstance(facts, Mapping) else dict(enumerate(facts or ()))
    return {
        slot: [phrases] if isinstance(phrases, str) else phrases for slot, phrases in slots.items() if phrases
    }


@functools.cache
def _sentiment_analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
