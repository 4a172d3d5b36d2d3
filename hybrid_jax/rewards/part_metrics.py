"""Metrics of the parts of a reward over one rollout."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from hybrid_jax.rewards.combine import Combiner, Weighing, WeightedSum
from hybrid_jax.rewards.part import Part

Metrics = dict[str, float]

SCORE, LENGTH = "score", "response_length"  # metrics beside those of parts; no part may have such a name


def describe(name: str, part: Part, raw: np.ndarray, unclipped: np.ndarray, clipped: np.ndarray) -> Metrics:
    """``<part>_mean``, ``_std``, ``_p10``, ``_p50``, ``_p90`` of the raw values; ``_clip_fraction``: the share
    clipped; and what the reward says of itself."""
    present = np.asarray(raw, np.float64)[~np.isnan(raw)]
    metrics = {}
    if present.size:
        low, middle, high = np.quantile(present, (0.1, 0.5, 0.9))
        metrics = {"mean": present.mean(), "std": present.std(), "p10": low, "p50": middle, "p90": high}
        if part.clip is not None:
            there = ~np.isnan(unclipped)
            metrics["clip_fraction"] = np.mean(clipped[there] != unclipped[there])
    diagnostics: Any = getattr(part.reward, "diagnostics", None)
    metrics |= {} if diagnostics is None else diagnostics()
    return {f"{name}_{what}": float(value) for what, value in metrics.items()}


def mean_weights(combiner: Combiner, weighing: Weighing) -> Metrics:
    """``<part>_weight``: its mean coefficient, unless the settings fix it."""
    if isinstance(combiner, WeightedSum):
        return {}
    return {f"{n}_weight": float(np.mean(c)) for n, c in weighing.coefficients.items() if c.size}


def correlations(values: Mapping[str, np.ndarray], lengths: np.ndarray | None) -> Metrics:
    """Pearson correlations over the rollout: ``<part>~<part>``, and ``<part>~response_length``.

    Left out where a value is the same in every row, since then there is none.
    """
    columns = dict(values) if lengths is None else {**values, LENGTH: np.asarray(lengths, np.float64)}
    if len(values) == 2:  # one part alone is the score itself
        columns = {name: column for name, column in columns.items() if name in (SCORE, LENGTH)}
    found = {f"{a}~{b}": _correlation(columns[a], columns[b]) for a, b in combinations(columns, 2)}
    return {name: value for name, value in found.items() if value is not None}


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if x.size < 2:
        return None
    x, y = x.astype(np.float64), y.astype(np.float64)  # rounded squares make more than 1
    scale = max(1.0, np.abs(x).max()) * max(1.0, np.abs(y).max())
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float(np.clip((x * y).sum() / norm, -1.0, 1.0)) if norm > 1e-9 * scale else None
