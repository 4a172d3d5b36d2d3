"""Log-probs of frozen models, computed once for every row and kept on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Read = Callable[[np.ndarray], np.ndarray]


class KeptLogProbs:
    """Numbers [N 2] of N rows, read in blocks the first time that a row of a block is asked for.

    A block is what a step of the first epoch reads, so that no step reads more than without this. What is in a
    block never changes: a run that resumes, and so reads blocks anew, gets the same bits.

    Args:
        order: the rows of the first epoch, [N].
        size: rows a block.
    """

    def __init__(self, order: np.ndarray, size: int):
        self._order, self._size = order, size
        self._place = np.argsort(order)
        self._values = np.zeros((len(order), 2), np.float32)
        self._known = np.zeros(-(-len(order) // size), bool)
        self._of: list[Any] = []

    def of(self, models: Any, index: np.ndarray, read: Read) -> np.ndarray:
        """The numbers of some rows, float32 [B 2].

        Args:
            models: parameters that were read; when they are others than before, all is read anew.
            index: numbers of rows, [B].
            read: reads ``size`` rows, by their numbers.
        """
        leaves = jax.tree.leaves(models)
        if len(leaves) != len(self._of) or any(a is not b for a, b in zip(leaves, self._of, strict=True)):
            self._known[:], self._of = False, leaves
        for block in np.unique(self._place[index] // self._size):
            if not self._known[block]:
                places = np.arange(block * self._size, (block + 1) * self._size)
                rows = self._order[places % len(self._order)]  # the last block is filled up from the start
                self._values[rows] = read(rows)
                self._known[block] = True
        return self._values[index]
