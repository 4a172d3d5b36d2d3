"""A scorer over many rows of tokens; where the trunk never trains, what it makes of a row is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.data.scored_text import padded
from hybrid_jax.models.base import Params
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.parallel.mesh import put_rows, whole_array
from hybrid_jax.parallel.rules import Placement, under

LENGTH_STEP = 32  # rows are read in lengths of this times a power of two


class ScorerReader:
    """Reads rows in batches of like length.

    Args:
        model: the scorer.
        placement: of its parameters.
        batch_size: rows read together.
        max_length: of a row.
        keeps_features: the trunk never trains, so that its vectors are computed once.
    """

    def __init__(
        self,
        scorer: TextScorer,
        placement: Placement,
        batch_size: int,
        max_length: int | None,
        keeps_features: bool = False,
    ):
        self._placement, self._batch_size, self._max_length = placement, batch_size, max_length
        self.keeps_features = keeps_features

        def score(params, tokens, mask):
            return scorer.apply(scorer.cast(params), tokens, mask).astype(jnp.float32)

        self._score = jax.jit(under(placement, score))
        if self.keeps_features:
            self._embed = jax.jit(under(placement, lambda *inputs: scorer.features(*inputs)))
            self._read = jax.jit(under(placement, lambda *inputs: scorer.read(*inputs)))
            self._features: dict[str, np.ndarray] = {}

    def scores(self, params: Params, rows: Sequence[np.ndarray], name: str | None = None) -> np.ndarray:
        """The numbers of each row, float32 [N Y]; with a ``name``, features are kept under it."""
        if self.keeps_features and name is not None:
            return np.asarray(self._read(params, self.features(params, rows, name)))
        return self._run(self._score, params, rows)

    def features(self, params: Params, rows: Sequence[np.ndarray], name: str) -> np.ndarray:
        """The trunk's features of the rows called ``name``, [N F]: computed once."""
        if name not in self._features:
            self._features[name] = self._run(self._embed, params, rows)
        return self._features[name]

    def _run(self, program: Callable[..., Any], params: Params, rows: Sequence[np.ndarray]) -> np.ndarray:
        order = np.argsort([len(row) for row in rows], kind="stable")
        waiting = []
        for start in range(0, len(rows), self._batch_size):
            chosen = [rows[i] for i in order[start : start + self._batch_size]]
            chosen += chosen[:1] * (self._batch_size - len(chosen))  # one shape for all
            arrays = padded(chosen, LENGTH_STEP, limit=self._max_length)
            waiting.append(program(params, *put_rows(self._placement, arrays)))
        found = np.concatenate([whole_array(numbers) for numbers in waiting])[: len(rows)]
        return found[np.argsort(order)]
