"""The scores that a reward gives to the answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from hybrid_jax.core.batches import Example
from hybrid_jax.rewards.base import columns_of
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.rewards.segments import TokenTexts


class AnswerScores:
    """Scores answers by one reward, as training does but for normalisers and baseline.

    Args:
        reward: of texts, or of tokens.
        prefix: before the names of its numbers, such as ``<phase>/`` where several phases have a reward.
    """

    def __init__(self, reward: CompositeReward, prefix: str = ""):
        self.reward, self.prefix = reward, prefix
        placed = {name: part for name, part in reward.parts.items() if part.is_placed}
        self._wholes = CompositeReward(placed) if placed else None

    @property
    def needs_pieces(self) -> bool:
        """Tells whether `of_texts` needs the text that each token adds."""
        return self._wholes is not None

    def of_texts(
        self,
        examples: Sequence[Example],
        responses: Sequence[str],
        columns: Sequence[str],
        pieces: TokenTexts | None = None,
        length: int | None = None,
    ) -> dict[str, list[Any]]:
        """Raw values of the parts of a reward on texts, one a row; nothing of one on tokens, or of no rows.

        Args:
            examples: those that were answered.
            responses: the answers.
            columns: of the whole data.
            pieces: the text that each token adds, where it `needs_pieces`.
            length: of the rows of tokens.
        """
        if self.reward.on_device or not examples:
            return {}
        prompts, values = [example.prompt for example in examples], columns_of(examples, columns)
        raw = self.reward.raw(prompts, responses, values, pieces, length)
        found = {f"{self.prefix}raw/{name}": scores.tolist() for name, scores in raw.items()}
        if self._wholes is not None:
            wholes = self._wholes.raw(prompts, responses, values)
            found |= {f"{self.prefix}whole/{name}": scores.tolist() for name, scores in wholes.items()}
        return found

    def scores(
        self, answers: Mapping[str, Sequence[Any]], prompts: Sequence[str]
    ) -> tuple[Float[np.ndarray, "B"], dict[str, Float[np.ndarray, "B"]]]:
        """The score, of segments where a part has a level, as in training; the parts, of whole responses.

        Args:
            answers: what `of_texts` gave, of all rows; ``<prefix>score`` of a reward on tokens.
            prompts: of all rows.
        """
        if self.reward.on_device:
            return np.asarray(answers[f"{self.prefix}score"], np.float32), {}
        raw = self._values(answers, "raw", self.reward)
        wholes = {} if self._wholes is None else self._values(answers, "whole", self._wholes)
        return self.reward.plain_scores(raw, prompts), {**raw, **wholes}

    def _values(self, answers: Mapping[str, Sequence[Any]], kind: str, reward: CompositeReward):
        names = {name: f"{self.prefix}{kind}/{name}" for name in reward.parts}
        return {name: np.asarray(answers[place], np.float32) for name, place in names.items()}
