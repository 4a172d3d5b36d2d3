"""Data as a few long streams, side by side, for a model whose state goes on from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybrid_jax.core.batches import Example, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.packing import encode_examples, token_batch
from hybrid_jax.data.tokenizer import Tokenizer


class ContinuousStream:
    """Batches whose row b goes on where row b of the batch before ended, k1 tokens further.

        all examples in the order of the data, joined and cut into equal lanes, one for each row of a batch
        row b of step s   lane b, tokens s k1 − (k2 − k1) … s k1 + k1, where k2 + 1 is the length of a row

    The targets of a row are its last k1 tokens: every token of a lane but its first is one once an epoch.
    What a row reads before them, the step before has read too. At the first step of an epoch that is padding.

    A sequence that goes on from the row before has the number 1; those that begin in the row are 2, 3, ….

    Args:
        examples: of a source.
        tokenizer: encodes them, once, here.
        length: of a row, k2 + 1.
        stride: k1, at most ``length`` − 1.
        lanes: rows of a batch.
        where: the settings stand, such as ``phases.sft``.

    Raises:
        UserError: there are fewer tokens than one batch reads.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        *,
        length: int,
        stride: int,
        lanes: int,
        where: str,
    ):
        sequences = encode_examples(examples, tokenizer, None)
        self._tokens = np.concatenate([sequence.tokens for sequence in sequences]).astype(np.int32)
        self._learned = np.concatenate([sequence.loss_mask for sequence in sequences])
        lengths = [len(sequence.tokens) for sequence in sequences]
        self._sequence = np.repeat(np.arange(len(sequences)), lengths)
        self._length, self._stride, self._lanes = length, stride, lanes
        self._lane = len(self._tokens) // lanes
        if self._lane <= stride:
            raise UserError(
                f"{where}: carry_state needs more than batch_size · {stride} = {lanes * stride} tokens, "
                f"got {len(self._tokens)} in the data; make batch_size or length smaller"
            )

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return self._lanes * ((self._lane - 1) // self._stride)

    def batch(self, cursor: int, size: int) -> TokenBatch:
        """The batch of step ``cursor / size``, [size length]."""
        assert size == self._lanes, "each row has a lane"
        step = cursor % self.num_rows // size
        read_before = self._length - 1 - self._stride
        at = step * self._stride - read_before + np.arange(self._length)
        real = np.broadcast_to(at >= 0, (size, self._length))
        index = np.arange(size)[:, None] * self._lane + np.maximum(at, 0)
        sequence = self._sequence[index]
        goes_on = sequence[:, 0] == self._sequence[np.maximum(index[:, 0] - 1, 0)]
        goes_on &= at[0] > 0
        changes = np.diff(sequence, axis=1, prepend=sequence[:, :1]) != 0
        numbers = 1 + ~goes_on[:, None] + np.cumsum(changes, axis=1)
        targets = self._learned[index] & (np.arange(self._length) > read_before)
        return token_batch(self._tokens[index], np.where(real, numbers, 0).astype(np.int32), targets & real)
