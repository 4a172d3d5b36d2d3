"""Measures of a reward model: from the rewards of held-out preferences to numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from hybrid_jax.data.preferences import Preference
from hybrid_jax.metrics.preference import accuracy, calibration_error, length_report, spearman


def agreement(
    preferences: Sequence[Preference], rewards: Sequence[np.ndarray], matched_ratio: float
) -> dict[str, float]:
    """How well rewards agree with preferences that are no ties, and what length has to do with it.

    Args:
        preferences: held out.
        rewards: of the responses of each, [K].
        matched_ratio: see `length_report`. Lengths are in characters, at least 1.

    Returns:
        ``accuracy`` over all pairs, ``margin`` r(better) − r(worse), ``calibration_error``,
        ``length_correlation`` (Spearman, over all responses), and what `length_report` gives; ``pairs``.
    """
    pairs = [
        (reward[i] - reward[j], _length(responses[i]), _length(responses[j]))
        for (responses, ranks), reward in zip((row.ranking for row in preferences), rewards, strict=True)
        for i, j in itertools.permutations(range(len(responses)), 2)
        if ranks[i] < ranks[j]
    ]
    texts = [response for row in preferences for response in row.ranking[0]]
    correlation = spearman(np.concatenate(list(rewards)), np.array([_length(text) for text in texts]))
    report = {"pairs": float(len(pairs)), "length_correlation": correlation}
    if not pairs:
        return report
    differences, better, worse = (np.array(column) for column in zip(*pairs, strict=True))
    return report | {
        "accuracy": accuracy(differences),
        "margin": float(differences.mean()),
        "calibration_error": calibration_error(differences),
        **length_report(differences, better, worse, matched_ratio),
    }


def _length(text: str) -> int:
    return max(len(text), 1)
