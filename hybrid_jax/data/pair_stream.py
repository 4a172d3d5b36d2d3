"""Pairs of answers as rows for a language model: what losses over preferences learn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.loader import visits
from hybrid_jax.data.packing import encode_examples, pad
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class PairStream:
    """Endless batches of pairs: the better answer of each first. The whole state is the cursor.

    Args:
        preferences: rows of a source; of more than two answers the best and the worst count, and ties
            are left out.
        tokenizer: of the model.
        length: T, tokens of a prompt with an answer; a pair with a longer one is left out.
        seed: of the order of the rows, at least 0.

    Raises:
        UserError: no pair is left.
    """

    def __init__(self, preferences: Sequence[Preference], tokenizer: Tokenizer, length: int, seed: int = 0):
        self._length, self._seed = length, seed
        told = [row for row in preferences if not row.tie]
        answers = [_answered(row, text) for row in told for text in (row.chosen, row.rejected)]
        encoded = encode_examples(answers, tokenizer, None) if answers else []
        if len(encoded) != len(answers):
            raise UserError("a conversation must be one row of tokens to be one of a pair, got several")
        pairs = list(zip(encoded[::2], encoded[1::2], strict=True))
        self._pairs = [pair for pair in pairs if max(len(row.tokens) for row in pair) <= length]
        if not self._pairs:
            raise UserError(f"the data is empty: no pair of answers has at most {length} tokens")
        if left_out := len(preferences) - len(self._pairs):
            log.warning(
                "%d of %d pairs are ties or longer than %d tokens: left out", left_out, len(preferences), length
            )

    def batch(self, cursor: int, size: int) -> TokenBatch:
        """Pairs ``cursor`` to ``cursor + size`` of the endless stream, [size 2 T]."""
        _, index = visits(len(self._pairs), self._seed, cursor, size)
        rows = pad([row for i in index for row in self._pairs[i]], self._length)
        return jax.tree.map(lambda x: np.reshape(x, (size, 2, self._length)), rows)


def _answered(row: Preference, text: str):
    messages = (*row.messages, {"role": "assistant", "content": text}) if row.messages else ()
    return replace(row.example, response=text, messages=messages)
