"""How well numbers agree with people's preferences, and how much of that is length."""

from __future__ import annotations

import numpy as np


def accuracy(differences: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Share of pairs in the right order; equal rewards count one half.

    Args:
        differences: r(better) − r(worse), [N], N at least 1.
        weights: of the pairs, [N]; all 1 if None.
    """
    return float(np.average(0.5 * (np.sign(differences) + 1.0), weights=weights))


def calibration_error(differences: np.ndarray, num_bins: int = 10) -> float:
    """Expected calibration error of P(better wins) = σ(difference), in [0, 0.5].

    Σ_b |pairs in b| / N · |accuracy in b − mean confidence in b| over ``num_bins`` equal bins of the confidence
    max(P, 1 − P), which lies in [0.5, 1] (Guo et al. 2017, 1706.04599, eq. 3): which of the two is called
    better must not matter.
    """
    confidence = 1.0 / (1.0 + np.exp(-np.abs(np.asarray(differences, np.float64))))
    right = 0.5 * (np.sign(differences) + 1.0)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, right - confidence, num_bins)  # |bin| · (accuracy − confidence)
    return float(np.abs(gaps).sum() / len(confidence))


def balanced_weights(better_lengths: np.ndarray, worse_lengths: np.ndarray) -> np.ndarray:
    """Weights of pairs [N] with which "the longer one wins" is right in exactly half of them.

    Pairs that the longer response won, and pairs that the shorter one won, weigh the same together; the sum of
    all is N. Pairs of equal length keep 1: any rule on lengths is right in half of them.

    Raises:
        ValueError: only one of the two kinds is there.
    """
    longer, shorter = better_lengths > worse_lengths, better_lengths < worse_lengths
    if longer.any() != shorter.any():
        raise ValueError("pairs must be won by the longer and by the shorter response, got one kind")
    half = (longer.sum() + shorter.sum()) / 2
    weights = np.ones(len(better_lengths))
    if longer.any():
        weights[longer], weights[shorter] = half / longer.sum(), half / shorter.sum()
    return weights


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, in [−1, 1]; equal values share their mean rank; 0 if either is constant."""
    ranks = [_mean_ranks(values) for values in (x, y)]
    centred = [values - values.mean() for values in ranks]
    scale = np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale > 0 else 0.0


def length_report(
    differences: np.ndarray, better_lengths: np.ndarray, worse_lengths: np.ndarray, matched_ratio: float
) -> dict[str, float]:
    """Tells whether a reward knows more than length, from pairs that are no tie.

    Args:
        differences: r(better) − r(worse), [N].
        better_lengths, worse_lengths: of the responses, [N], at least 1.
        matched_ratio: pairs with |log(better / worse)| up to this are matched in length.

    Returns:
        ``longer_wins``, the accuracy of the length alone; ``length_matched_accuracy`` of the reward beside
        ``length_matched_longer_wins`` on the ``length_matched_pairs`` (a number); ``length_balanced_accuracy``,
        on all pairs so weighted that length is right in one half (`balanced_weights`). What cannot be measured,
        for no pair is of that kind, is left out.
    """
    longer = np.sign(better_lengths - worse_lengths)
    matched = np.abs(np.log(better_lengths / worse_lengths)) <= matched_ratio
    report = {"longer_wins": accuracy(longer), "length_matched_pairs": float(matched.sum())}
    if matched.any():
        report["length_matched_accuracy"] = accuracy(differences[matched])
        report["length_matched_longer_wins"] = accuracy(longer[matched])
    if (longer > 0).any() == (longer < 0).any():
        weights = balanced_weights(better_lengths, worse_lengths)
        report["length_balanced_accuracy"] = accuracy(differences, weights)
    return report


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]
