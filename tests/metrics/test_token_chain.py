"""The chain that answers make, against chains whose numbers are known."""

import numpy as np
import pytest

from hybrid_jax.metrics.token_chain import OTHERS, TokenChain
from hybrid_jax.testing import START, TRANSITION


def test_walks_of_one_answer_have_the_numbers_of_the_hand_made_chain():
    """0 → 7 → 7 → 3 → 0, twice: of 7 half goes on to 7 and half to 3, all else is certain."""
    chain = TokenChain.of([[7, 7, 3], [7, 7, 3], []])
    assert chain.tokens == (7, 3)
    np.testing.assert_allclose(chain.transitions, [[0, 1, 0], [0, 0.5, 0.5], [1, 0, 0]])
    np.testing.assert_allclose(chain.stationary, [0.25, 0.5, 0.25])
    # λ³ − λ²/2 − 1/2 = (λ − 1)(λ² + λ/2 + 1/2): the others have the modulus √½.
    assert chain.spectral_gap == pytest.approx(1 - 0.5**0.5)
    expected = {"period": 1, "stationary_entropy": 1.5 * np.log(2), "entropy_rate": 0.5 * np.log(2)}
    assert chain.numbers() == pytest.approx({**expected, "spectral_gap": 1 - 0.5**0.5})


def test_a_loop_that_always_takes_as_long_has_a_period_and_no_gap():
    chain = TokenChain.of([[5, 6], [5, 8]])
    assert chain.period == 3
    assert chain.spectral_gap == pytest.approx(0, abs=1e-7)
    assert TokenChain.of([[5, 6], [5]]).period == 1


def test_long_walks_have_the_stationary_distribution_of_their_source():
    rng = np.random.default_rng(0)
    walk = [int(rng.choice(3, p=START))]
    for _ in range(60_000):
        walk.append(int(rng.choice(3, p=TRANSITION[walk[-1]])))
    chain = TokenChain.of([walk])
    values, vectors = np.linalg.eig(TRANSITION.T)
    true = np.real(vectors[:, np.argmax(values.real)])
    order = [chain.tokens.index(token) + 1 for token in range(3)]
    assert 0.5 * np.abs(chain.stationary[order] - true / true.sum()).sum() < 0.01
    moduli = np.sort(np.abs(values))
    assert chain.spectral_gap == pytest.approx(1 - moduli[-2], abs=0.02)
    pi = true / true.sum()
    assert chain.numbers()["entropy_rate"] == pytest.approx(
        -(pi @ (TRANSITION * np.log(TRANSITION)).sum(1)), rel=0.01
    )


def test_rare_tokens_are_one_state_and_no_token_is_an_error():
    chain = TokenChain.of([[1, 1, 1, 2, 2, 3, 4]], most=4)
    assert chain.tokens == (1, 2, OTHERS)
    assert chain.counts[3, 3] == 1
    with pytest.raises(ValueError, match="answers must have a token, got none"):
        TokenChain.of([[], []])
