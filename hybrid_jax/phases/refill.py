"""Refilled batches: prompts whose answers all earn the same are replaced by further ones, within the step.

Where no answer to a prompt earned more than another, none is to become more likely: the group has advantage 0,
and the batch is smaller than it seems. Every round asks a whole batch of prompts, so that no shape is new, and
its groups with a difference fill the places that are still free.

Source: Yu et al. 2025 (arXiv 2503.14476), section 3.2, where it is called dynamic sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hybrid_jax.core.batches import Rollout
from hybrid_jax.parallel.mesh import fetch_rows, gather_rows, put_rows
from hybrid_jax.parallel.rules import Placement, shard_rows, under


class Refill:
    """Fills the batches of one phase.

    Args:
        placement: of the rollouts.
        num_prompts: of a batch.
        num_samples: answers to each prompt.
    """

    def __init__(self, placement: Placement, num_prompts: int, num_samples: int):
        self._placement, self._num_prompts, self._num_samples = placement, num_prompts, num_samples
        self.merge = jax.jit(under(placement, merged))

    def begin(self) -> RefilledBatch:
        """An empty batch."""
        return RefilledBatch(self)

    def fetched(self, scores: jax.Array) -> np.ndarray:
        """The scores [B] of all processes, as [prompts, answers to each]."""
        rows = self._num_prompts * self._num_samples
        everywhere = gather_rows(self._placement, fetch_rows(scores), rows)
        return everywhere.reshape(self._num_prompts, self._num_samples)

    def put(self, of_prompts: np.ndarray) -> Any:
        """Something of each prompt, for each answer to it, on the devices."""
        return put_rows(self._placement, np.repeat(of_prompts, self._num_samples, axis=0))

    def rows(self, sources: np.ndarray) -> Any:
        """The rows of groups of two rollouts, one behind the other; on the devices."""
        answers = np.arange(self._num_samples)
        rows = (sources[:, None] * self._num_samples + answers).reshape(-1)
        return put_rows(self._placement, rows.astype(np.int32))


class RefilledBatch:
    """The batch of one step, while it fills."""

    def __init__(self, refill: Refill):
        self._refill = refill
        self._rollout: Rollout | None = None
        self._filled = np.zeros(refill._num_prompts, bool)
        self._plain: list[np.ndarray] = []
        self._num_filtered = 0

    @property
    def is_full(self) -> bool:
        """Tells whether every place has a group whose answers earned differently."""
        return bool(self._filled.all())

    def add(self, rollout: Rollout) -> None:
        """Takes the groups of a round that fit."""
        scores = self._refill.fetched(rollout.scores)
        self._plain.append(self._refill.fetched(rollout.plain_scores))
        differ = scores.max(axis=1) > scores.min(axis=1)
        self._num_filtered += int((~differ).sum())
        if self._rollout is None:
            self._rollout, self._filled = rollout, differ
            return
        free, found = np.flatnonzero(~self._filled), np.flatnonzero(differ)
        count = min(len(free), len(found))
        sources = np.arange(len(differ))
        sources[free[:count]] = len(differ) + found[:count]
        self._filled[free[:count]] = True
        self._rollout = self._refill.merge(self._rollout, rollout, self._refill.rows(sources))

    def rollout(self) -> Rollout:
        """The batch; places that nothing filled hold groups that do not count in the loss."""
        assert self._rollout is not None, "add a round first"
        return replace(self._rollout, counts=self._refill.put(self._filled))

    def metrics(self, of_rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The metrics of the rounds, on average; scores are of all answers, not of those kept."""
        # Not every round has every number: a correlation needs two different values.
        names = dict.fromkeys(name for metrics in of_rounds for name in metrics)
        known = {name: [float(metrics[name]) for metrics in of_rounds if name in metrics] for name in names}
        means = {name: float(np.mean(numbers)) for name, numbers in known.items()}
        plain = np.concatenate(self._plain)
        scores = {"score": float(plain.mean()), "score_std": float(plain.std())}
        return {**means, **scores, "rounds": len(of_rounds), "filtered_groups": self._num_filtered}


def merged(kept: Rollout, fresh: Rollout, rows: Int[Array, "B"]) -> Rollout:
    """Rows of two rollouts of one shape, numbered as if ``fresh`` stood behind ``kept``.

    Groups move as a whole, and are numbered by their places.
    """
    chosen = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], kept, fresh)
    return shard_rows(replace(chosen, group=kept.group))
