"""Rewards under n-gram models trained on text files: fluency, and likeness to a domain."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Order, settings
from hybrid_jax.data.sources import Jsonl, Text
from hybrid_jax.metrics.ngram_text import NgramText, Unit, vocabulary_of
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("ngram_fluency")
@settings
class NgramFluency:
    """Mean log-probability of the response's tokens under a Kneser-Ney model of a text, in nats, below 0.

    ``exp(-reward)`` is the perplexity. Such a model gives repeated phrases high scores: add `repetition`. A
    response without tokens scores ``-log V``, the score of blind guessing.

    Attributes:
        path: What the model is trained on, once a process: ``.jsonl`` (``.jsonl.gz``) with one text a row, or
            one plain text.
        order: n, so that a token depends on the n - 1 before it.
        unit: character, or word (lower-case words and punctuation marks).
        field: The field of a row of a jsonl file.
    """

    path: Path
    order: Order = 6
    unit: Unit = "character"
    field: str = "text"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        (model,) = _models(dated_files(self.path), self.order, self.unit, self.field)
        blind = -math.log(model.model.vocab_size)
        log_probs = [model.log_probs(response) for response in responses]
        return [float(row.mean()) if len(row) else blind for row in log_probs]


@REWARDS.register("domain_relevance")
@settings
class DomainRelevance:
    """``(log P_in(y) - log P_general(y)) / |y|`` in nats a token (Moore and Lewis 2010).

    Two Kneser-Ney models of equal vocabulary, that of both texts together. Above 0 for a response more like
    the domain than like the general text, 0 for one without tokens; swapping the files changes the sign. An
    unigram model, the default, tells topics apart; a higher order counts phrases, too.

    Attributes:
        path: A text of the domain, as in `NgramFluency`.
        general: A general text.
        order: n of both models.
        unit: character or word.
        field: The field of a row of a jsonl file, in both.
    """

    path: Path
    general: Path
    order: Order = 1
    unit: Unit = "word"
    field: str = "text"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        inside, outside = _models(dated_files(self.path, self.general), self.order, self.unit, self.field)
        pairs = [(inside.log_probs(response), outside.log_probs(response)) for response in responses]
        return [float(ours.mean() - theirs.mean()) if len(ours) else 0.0 for ours, theirs in pairs]


Files = tuple[tuple[Path, int], ...]  # path of each file, and when it was changed: then it is read anew


def dated_files(*paths: Path) -> Files:
    """The files with their times, by which what was made of them is remembered."""
    try:
        return tuple((path, path.stat().st_mtime_ns) for path in map(Path, paths))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=4)
def _models(files: Files, order: int, unit: Unit, field: str) -> list[NgramText]:
    """Trains a model of each file, all over the vocabulary of all files together."""
    corpora = [read_texts(path, field) for path, _ in files]
    vocabulary = vocabulary_of((text for texts in corpora for text in texts), unit)
    return [NgramText.train(texts, unit, order - 1, vocabulary=vocabulary) for texts in corpora]


def read_texts(path: Path, field: str) -> list[str]:
    """The texts of a file: of ``field`` in each row of a jsonl, else the whole."""
    rows = ".jsonl" in path.suffixes[-2:]
    source = Jsonl(train=path, prompt_field=None, response_field=field) if rows else Text(train=path)
    return [example.response or "" for example in source.load("train")]
