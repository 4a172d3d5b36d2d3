"""A reward for coherence: whether the sentences of a response stand in their order for a reason."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.metrics.sentence_order import SentenceOrder, train_order
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.ngram import Files, dated_files, read_texts


@REWARDS.register("coherence")
@settings
class Coherence:
    """The mean probability that the response stands before permutations of its own sentences, in (0, 1).

    The discriminator (`metrics.sentence_order`) is trained once a process, on the texts of ``path`` and
    permutations of them: an entity grid of neighbours (Barzilay and Lapata 2008), years, and what neighbours
    and the first sentence begin with. A half is chance: of one sentence, and of the same sentence again and
    again, which therefore never scores highest. Order alone is judged, not what is said: give it beside a
    reward of quality.

    Attributes:
        path: Texts in good order, one a row of a ``.jsonl``, or one a line of a plain text.
        field: The field of a row of a jsonl file.
        permutations: Of each text, in training and in scoring.
        max_sentences: Sentences of a text that are read.
    """

    path: Path
    field: str = "text"
    permutations: Count = 10
    max_sentences: Count = 40

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        model = _trained(dated_files(self.path), self.field, self.permutations, self.max_sentences)
        return [
            model.order_probability(response, self.permutations, self.max_sentences) for response in responses
        ]


@functools.lru_cache(maxsize=4)
def _trained(files: Files, field: str, permutations: int, max_sentences: int) -> SentenceOrder:
    ((path, _),) = files
    texts = read_texts(path, field)
    if ".jsonl" not in path.suffixes[-2:]:
        texts = [line for text in texts for line in text.split("\n")]
    try:
        return train_order(texts, permutations, max_sentences)
    except ValueError as error:
        raise UserError(f"coherence: {path} has nothing to learn an order from: {error}") from error
