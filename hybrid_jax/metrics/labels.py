"""How well predicted labels, and their probabilities, agree with the true ones: float64, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def softmax(logits: Float[np.ndarray, "B Y"], temperature: float = 1.0) -> Float[np.ndarray, "B Y"]:
    """``exp(logits / T)``, normalised."""
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def accuracy(predicted: Int[np.ndarray, "B"], labels: Int[np.ndarray, "B"]) -> float:
    """The share of rows whose label was predicted, in [0, 1]."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1_scores(
    predicted: Int[np.ndarray, "B"], labels: Int[np.ndarray, "B"], num_labels: int
) -> Float[np.ndarray, "Y"]:
    """``2 TP / (2 TP + FP + FN)`` of each label; 0 for a label that is neither there nor predicted."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    hits = np.bincount(labels[predicted == labels], minlength=num_labels)
    named = np.bincount(predicted, minlength=num_labels) + np.bincount(labels, minlength=num_labels)
    return 2 * hits / np.maximum(named, 1)


def macro_f1(predicted: Int[np.ndarray, "B"], labels: Int[np.ndarray, "B"], num_labels: int) -> float:
    """The mean over the labels, each counting the same."""
    return float(f1_scores(predicted, labels, num_labels).mean())


def weighted_f1(predicted: Int[np.ndarray, "B"], labels: Int[np.ndarray, "B"], num_labels: int) -> float:
    """The mean over the labels, each counting as often as it is there."""
    counts = np.bincount(np.asarray(labels), minlength=num_labels)
    return float(f1_scores(predicted, labels, num_labels) @ counts / counts.sum())


def brier_score(probabilities: Float[np.ndarray, "B Y"], labels: Int[np.ndarray, "B"]) -> float:
    """``mean_b Σ_c (p_b(c) − [c = y_b])²`` (Brier 1950): in [0, 2], 0 is best."""
    errors = np.array(probabilities, np.float64)
    errors[np.arange(len(errors)), np.asarray(labels)] -= 1.0
    return float(np.square(errors).sum(axis=1).mean())


def calibration_error(
    probabilities: Float[np.ndarray, "B Y"], labels: Int[np.ndarray, "B"], num_bins: int = 15
) -> float:
    """Expected calibration error, ``Σ_k |B_k| / B · |accuracy(B_k) − confidence(B_k)|`` (Guo et al. 2017).

    Rows fall into bins (k/K, (k+1)/K] of their largest probability.
    """
    probabilities = np.asarray(probabilities, np.float64)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == np.asarray(labels)
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def fit_temperature(
    logits: Float[np.ndarray, "B Y"], labels: Int[np.ndarray, "B"], bounds: tuple[float, float] = (0.05, 20.0)
) -> float:
    """T that minimises the cross-entropy of ``softmax(logits / T)`` (Guo et al. 2017, section 4.2).

    The cross-entropy is convex in 1/T, so its slope there, ``mean_b (E_p z_b − z_b(y_b))``, has one zero:
    bisected between ``bounds``, where T stays if it lies beyond.
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    of_label = logits[np.arange(len(logits)), np.asarray(labels)]

    def slope(inverse: float) -> float:
        return float(np.mean((softmax(logits, 1.0 / inverse) * logits).sum(axis=1) - of_label))

    low, high = 1.0 / bounds[1], 1.0 / bounds[0]
    if slope(low) >= 0 or slope(high) <= 0:
        return bounds[1] if slope(low) >= 0 else bounds[0]
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2.0 / (low + high)


def classification_report(
    logits: Float[np.ndarray, "B Y"],
    labels: Int[np.ndarray, "B"],
    names: Sequence[str],
    temperature: float = 1.0,
) -> dict[str, float]:
    """Accuracy, F1 (macro, weighted, of each label), Brier score and calibration error, under a name each.

    Args:
        logits: of every row.
        labels: the true ones.
        names: of the labels.
        temperature: of the probabilities, which no prediction depends on.
    """
    labels, predicted = np.asarray(labels), np.asarray(logits).argmax(axis=1)
    probabilities = softmax(logits, temperature)
    of_label = f1_scores(predicted, labels, len(names))
    return {
        "accuracy": accuracy(predicted, labels),
        "macro_f1": macro_f1(predicted, labels, len(names)),
        "weighted_f1": weighted_f1(predicted, labels, len(names)),
        "brier": brier_score(probabilities, labels),
        "calibration_error": calibration_error(probabilities, labels),
        **{f"f1_{name}": float(value) for name, value in zip(names, of_label, strict=True)},
    }


def regression_report(predictions: Float[np.ndarray, "B"], targets: Float[np.ndarray, "B"]) -> dict[str, float]:
    """Mean squared error, its root, and Pearson's correlation (0 where one side is constant)."""
    predictions, targets = np.asarray(predictions, np.float64), np.asarray(targets, np.float64)
    error = float(np.square(predictions - targets).mean())
    spread = predictions.std() * targets.std()
    moment = np.mean((predictions - predictions.mean()) * (targets - targets.mean()))
    return {"mse": error, "rmse": error**0.5, "pearson": float(moment / spread) if spread > 0 else 0.0}
