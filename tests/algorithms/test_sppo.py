"""SPPO on numbers that are known: win rates of groups, and the regression on them."""

import numpy as np
import pytest

from hybrid_jax.algorithms.preference_losses import SPPOHard
from hybrid_jax.algorithms.sppo import SPPO, win_rates

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.normal(-9, 2, (2, 5, 3)).astype(np.float32)


def test_a_win_rate_is_the_share_of_the_others_that_an_answer_beats():
    scores = RNG.integers(0, 3, (6, 4)).astype(np.float32)  # with ties
    expected = [
        [sum((a > b) + 0.5 * (a == b) for j, b in enumerate(row) if j != i) / 3 for i, a in enumerate(row)]
        for row in scores
    ]
    np.testing.assert_allclose(win_rates(scores), expected, rtol=1e-6)
    np.testing.assert_allclose(np.mean(win_rates(scores), axis=1), 0.5, rtol=1e-6)


def test_sppo_is_its_formula():
    wins = RNG.uniform(size=(5, 3)).astype(np.float32)
    expected = [
        np.mean([(p - r - 4.0 * (w - 0.5)) ** 2 for p, r, w in zip(*rows, strict=True)])
        for rows in zip(POLICY.tolist(), REFERENCE.tolist(), wins.tolist(), strict=True)
    ]
    np.testing.assert_allclose(SPPO(beta=0.25)(POLICY, REFERENCE, wins), expected, rtol=1e-5)


def test_of_certain_wins_of_pairs_it_is_half_of_sppo_hard():
    policy, reference = POLICY[:, :2], REFERENCE[:, :2]
    wins = np.tile(np.array([1.0, 0.0], np.float32), (5, 1))
    hard = SPPOHard(beta=0.25)(policy, reference, np.ones((5, 2), np.float32))
    np.testing.assert_allclose(SPPO(beta=0.25)(policy, reference, wins), 0.5 * hard, rtol=1e-6)
    assert float(SPPO(beta=0.25)(policy, policy - 2.0 * (2 * wins - 1), wins).max()) == pytest.approx(
        0.0, abs=1e-9
    )
