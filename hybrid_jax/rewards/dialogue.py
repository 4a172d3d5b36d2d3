"""Rewards of an answer in a conversation: by what the user said, what a reference names, and what follows."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen

from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.metrics.text import sentences, words
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.ngram import Files, dated_files, read_texts
from hybrid_jax.rewards.overlap import accepted_texts
from hybrid_jax.rewards.similarity import CosineSimilarity


@REWARDS.register("relevance")
@settings
class Relevance:
    """``min(cos(v(response), v(turn)), enough) / enough``: likeness to the user's last turn, at most 1.

    v weighs words as ``(1 + log tf) · (log((1 + N) / (1 + df)) + 1)``, with tf the word in the text and df the
    texts of ``path`` that hold it, of N (Salton and Buckley 1988; smoothed as in scikit-learn); it is then in
    [0, 1], and 0 for a text without words. With ``encoder``, v is the sentence embedding of `CosineSimilarity`.
    The turn is the prompt: in a conversation, the message that is answered. To repeat it gives the highest
    score, so set ``enough`` below 1, or add `repetition` or a reward against copying.

    Attributes:
        path: Texts whose common words count less: ``.jsonl``, one text a row, or lines of a plain text. None
            lets all words count alike.
        field: The field of a row of a jsonl file.
        encoder: Folder of an encoder, instead of words.
        enough: The likeness above which more earns nothing.
        batch_size: Texts that the encoder reads at a time.
    """

    path: Path | None = None
    field: str = "text"
    encoder: str | None = None
    enough: Annotated[float, Interval(gt=0, le=1)] = 1.0
    batch_size: BatchSize = 32

    def __post_init__(self):
        if self.path is not None and self.encoder is not None:
            raise ValueError("path weighs words and encoder reads texts without them; give one of the two")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return self.start(prompts, responses)()

    def start(self, prompts: Sequence[str], responses: Sequence[str]) -> Callable[[], list[float]]:
        """Starts embedding where there is an encoder; returns what waits for the scores."""
        if self.encoder is not None:
            similarity = CosineSimilarity(self.encoder, to="prompt", batch_size=self.batch_size)
            cosines = similarity.start(prompts, responses)
            return lambda: [min(cosine, self.enough) / self.enough for cosine in cosines()]
        return lambda: [
            min(self._by_words(*pair), self.enough) / self.enough
            for pair in zip(prompts, responses, strict=True)
        ]

    def _by_words(self, one: str, other: str) -> float:
        counts, texts = _rarity(dated_files(self.path), self.field) if self.path else ({}, 0)
        first, second = (_weights(text, counts, texts) for text in (one, other))
        norms = math.sqrt(_dot(first, first) * _dot(second, second))
        return min(_dot(first, second) / norms, 1.0) if norms else 0.0


@REWARDS.register("engagement")
@settings
class Engagement:
    """``min(n, horizon) / horizon`` for n turns that the conversation still had behind the answer, in [0, 1].

    n is the column ``turns_left``, which a phase with an environment gives for each answer: 0 for the last one.
    Rows of data have no such column, for nothing follows their answer. Where the environment ends a
    conversation that went well, a longer one is no better one.

    Attributes:
        horizon: Turns behind which more earn nothing.
    """

    horizon: Count = 4

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], turns_left: Sequence[int]
    ) -> list[float]:
        return [min(left, self.horizon) / self.horizon for left in turns_left]


@REWARDS.register("entity_overlap")
@settings
class EntityOverlap:
    """F1 of the names, times and numbers that an answer shares with its best reference, in [0, 1].

    ``2 |A ∩ R| / (|A| + |R|)`` over sets; 1 where neither has any. A time is ``12:45`` or ``5 pm``; a number is
    a word with a digit that is no part of a time; a name is a word with a capital that does not begin a
    sentence. The column is ``references``; `Chat` with ``context_turns`` gives it.

    Attributes:
        kinds: Which of them count.
    """

    kinds: Annotated[tuple[Literal["names", "times", "numbers"], ...], MinLen(1)] = (
        "names",
        "times",
        "numbers",
    )

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[Any]
    ) -> list[float]:
        accepted = accepted_texts("references", references)
        return [
            max(self._f1(response, reference) for reference in known)
            for response, known in zip(responses, accepted, strict=True)
        ]

    def _f1(self, *texts: str) -> float:
        found, wanted = ({(k, e) for k in self.kinds for e in entities(text)[k]} for text in texts)
        both = len(found) + len(wanted)
        return 2 * len(found & wanted) / both if both else 1.0


_TIME = re.compile(r"\b\d{1,2}:\d{2}(?:\s*[ap]\.?m\b)?|\b\d{1,2}\s*[ap]\.?m\b", re.IGNORECASE)
_WITH_DIGIT = re.compile(r"\b\w*\d\w*\b")
_WORD = re.compile(r"\b[^\W\d_][\w'-]*")


def entities(text: str) -> dict[str, set[str]]:
    """The names, times and numbers of a text, in lower case and without white space within them."""
    times = {"".join(time.lower().split()) for time in _TIME.findall(text)}
    rest = _TIME.sub(" ", text)
    numbers = {number.lower() for number in _WITH_DIGIT.findall(rest)}
    inner = [word for sentence in sentences(rest) for word in _WORD.findall(sentence)[1:]]
    names = {word.lower() for word in inner if word[0].isupper() and len(word) > 1}
    return {"times": times, "numbers": numbers, "names": {name for name in names if name not in numbers}}


def _weights(text: str, counts: Mapping[str, int], texts: int) -> dict[str, float]:
    return {
        word: (1 + math.log(times)) * (math.log((1 + texts) / (1 + counts.get(word, 0))) + 1)
        for word, times in sorted(Counter(words(text)).items())
    }


def _dot(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return sum(weight * other[word] for word, weight in one.items() if word in other)


@functools.lru_cache(maxsize=4)
def _rarity(files: Files, field: str) -> tuple[Counter[str], int]:
    """Counts the texts that hold each word, and the texts."""
    ((path, _),) = files
    texts = [line for text in read_texts(path, field) for line in text.splitlines() if line.strip()]
    return Counter(word for text in texts for word in set(words(text))), len(texts)
