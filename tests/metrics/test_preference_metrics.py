"""Measures of preferences: counted by hand, and against scipy."""

import numpy as np
import pytest

from hybrid_jax.metrics.preference import (
    accuracy,
    balanced_weights,
    calibration_error,
    length_report,
    spearman,
)


def test_accuracy_counts_equal_rewards_one_half():
    assert accuracy(np.array([1.0, -2.0, 0.0, 3.0])) == 2.5 / 4


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    log_odds = np.log(0.8 / 0.2)  # confidence 0.8 everywhere, right in 3 of 4
    assert calibration_error(np.array([1, 1, 1, -1]) * log_odds) == pytest.approx(0.05)
    certain = np.log(0.95 / 0.05)  # two bins: |1 - .8| of 2 pairs, |.5 - .95| of 2 pairs
    differences = np.array([log_odds, log_odds, certain, -certain])
    assert calibration_error(differences) == pytest.approx((2 * 0.2 + 2 * 0.45) / 4)


def test_spearman_is_that_of_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 9, 50), draw.normal(0, 1, 50)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-9)
    assert spearman(np.ones(5), y[:5]) == 0.0


def test_balanced_weights_make_length_right_in_half_of_the_pairs():
    better, worse = np.array([9, 8, 7, 1, 5]), np.array([2, 3, 4, 6, 5])
    weights = balanced_weights(better, worse)
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 2.0, 1.0])
    assert accuracy(np.sign(better - worse), weights) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="won by the longer and by the shorter"):
        balanced_weights(better[:3], worse[:3])


def test_the_length_report_tells_a_length_counter_from_a_reward():
    better, worse = np.array([30, 20, 21, 10, 10]), np.array([10, 10, 20, 20, 11])
    counter = length_report(better - worse, better, worse, 0.2)
    assert counter == {
        "longer_wins": 0.6,
        "length_matched_pairs": 2.0,
        "length_matched_accuracy": 0.5,
        "length_matched_longer_wins": 0.5,
        "length_balanced_accuracy": pytest.approx(0.5),
    }
    perfect = length_report(np.ones(5), better, worse, 0.2)
    assert (perfect["length_matched_accuracy"], perfect["length_balanced_accuracy"]) == (1.0, pytest.approx(1))
    assert "length_balanced_accuracy" not in length_report(np.ones(2), better[:2], worse[:2], 0.2)
