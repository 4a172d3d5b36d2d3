"""Rewards for style: readability and formality of English."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Interval

from hybrid_jax.core.ranges import Positive, settings
from hybrid_jax.metrics.style import formality, reading_ease
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("readability")
@settings
class Readability:
    """``-|FRE - target| / scale``: the Flesch reading ease of the response against a target; at most 0.

    FRE (Flesch 1948) is about 100 for very easy and 30 for difficult English. Unbounded below, since one very
    long word has a very low ease: clip the part. A response without words scores as the end of the usual scale,
    0 or 100, that is further from the target.

    Attributes:
        target: Wanted ease.
        scale: Points off that cost 1.
    """

    target: Annotated[float, Interval(ge=-1000, le=206.835)] = 65.0
    scale: Positive = 30.0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        worst = max(abs(self.target), abs(100 - self.target))
        eases = [reading_ease(response) for response in responses]
        return [-(worst if ease is None else abs(ease - self.target)) / self.scale for ease in eases]


@REWARDS.register("formality")
@settings
class Formality:
    """Heylighen and Dewaele's F-score / 100 of the response, in [0, 1], with guessed word classes.

    A proxy for English, see `metrics.style.formality`: nouns, adjectives, prepositions and articles are
    formal; pronouns, verbs, adverbs and interjections are not. A list of nouns maximises it, so it needs a
    measure of fluency beside it. 0.5 for a response without words.
    """

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [formality(response) / 100 for response in responses]
