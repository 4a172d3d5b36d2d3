"""Measures of labels against scikit-learn, scipy and small cases by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score

from hybrid_jax.metrics.labels import (
    accuracy,
    brier_score,
    calibration_error,
    classification_report,
    f1_scores,
    fit_temperature,
    macro_f1,
    regression_report,
    softmax,
    weighted_f1,
)

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.choice(4, 300, p=[0.6, 0.3, 0.1, 0.0])  # the last one is never there
LOGITS = RANDOM.normal(size=(300, 4)) * 2 + 1.5 * np.eye(4)[LABELS]


def test_f1_and_accuracy_are_those_of_scikit_learn():
    predicted = LOGITS.argmax(1)
    settings = {"labels": range(4), "zero_division": 0}
    np.testing.assert_allclose(
        f1_scores(predicted, LABELS, 4), f1_score(LABELS, predicted, average=None, **settings)
    )
    assert macro_f1(predicted, LABELS, 4) == pytest.approx(
        f1_score(LABELS, predicted, average="macro", **settings)
    )
    expected = f1_score(LABELS, predicted, average="weighted", **settings)
    assert weighted_f1(predicted, LABELS, 4) == pytest.approx(expected)
    assert accuracy(predicted, LABELS) == pytest.approx(accuracy_score(LABELS, predicted))


def test_calibration_error_by_hand():
    # confidences .9 .9 .9 .6; right, right, wrong, wrong: 3/4 · |2/3 − .9| + 1/4 · |0 − .6| = .325
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.6, 0.4]])
    assert calibration_error(probabilities, np.array([0, 1, 1, 1]), num_bins=10) == pytest.approx(0.325)


def test_calibration_error_is_that_of_a_loop_over_bins():
    probabilities = softmax(LOGITS)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == LABELS
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            total += inside.sum() / len(LABELS) * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, LABELS) == pytest.approx(total)


def test_brier_score_by_hand():
    # (.3² + .3²) and (.8² + .8²), halved
    assert brier_score(np.array([[0.7, 0.3], [0.8, 0.2]]), np.array([0, 1])) == pytest.approx((0.18 + 1.28) / 2)


def test_the_temperature_minimises_the_cross_entropy():
    def loss(log_temperature):
        return -log_softmax(LOGITS / np.exp(log_temperature), axis=1)[np.arange(300), LABELS].mean()

    best = np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded", options={"xatol": 1e-10}).x)
    assert fit_temperature(LOGITS, LABELS) == pytest.approx(best, rel=1e-5)
    assert fit_temperature(3 * LOGITS, LABELS) == pytest.approx(3 * best, rel=1e-5)


def test_a_temperature_without_a_minimum_stays_within_bounds():
    assert fit_temperature(np.eye(3), np.arange(3)) == 0.05  # always right: the sharper the better
    assert fit_temperature(np.eye(3), np.array([1, 2, 0])) == 20.0  # always wrong
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 0])) == 20.0  # knows nothing


def test_a_temperature_changes_no_prediction():
    cold, warm = (classification_report(LOGITS, LABELS, "abcd", t) for t in (0.5, 2.0))
    assert cold["accuracy"] == warm["accuracy"]
    assert cold["f1_a"] == warm["f1_a"]
    assert cold["brier"] != warm["brier"]


def test_regression_by_hand():
    found = regression_report(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 3.0]))
    expected = {"mse": 2 / 3, "rmse": (2 / 3) ** 0.5, "pearson": np.corrcoef([1, 2, 4], [1, 3, 3])[0, 1]}
    assert found == pytest.approx(expected)
