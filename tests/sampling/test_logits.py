"""Temperature, top-k and top-p against golden numbers, and the draw against the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from hybrid_jax.sampling.logits import draw, keep_top_k, keep_top_p, sample_token, sampling_logits

P = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


def _probabilities(order=slice(None), **settings):
    return np.asarray(jax.nn.softmax(sampling_logits(jnp.log(jnp.asarray(P[order])), **settings)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),  # 0.25 crosses 0.6 and stays
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0]),  # reached exactly: nothing more is needed
        # 0.5 + 0.25 + 0.15 against 0.9 is a matter of the last float32 bit, so just above it
        ({"top_p": 0.9001}, [0.515464, 0.257732, 0.154639, 0.072165, 0]),
        ({"top_p": 1.0}, P),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.733568, 0.183392, 0.066020, 0.014378, 0.002641]),
        ({"temperature": 0.5, "top_p": 0.75}, [0.8, 0.2, 0, 0, 0]),  # temperature first
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 5}, P),
        ({"top_k": 50}, P),
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0, 0]),  # top-p of what top-k left
    ],
)
def test_truncation_gives_the_golden_numbers_in_any_order_of_the_vocabulary(settings, expected):
    np.testing.assert_allclose(_probabilities(**settings), expected, atol=2e-6)
    shuffled = np.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(_probabilities(shuffled, **settings), np.asarray(expected)[shuffled], atol=2e-6)


def test_equal_logits_are_cut_off_by_their_index():
    flat = jnp.zeros((2, 4))
    np.testing.assert_array_equal(jnp.isfinite(keep_top_k(flat, 3)), [[True, True, True, False]] * 2)
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(flat, 0.5)), [[True, True, False, False]] * 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 1.3}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_draws_have_the_distribution_they_claim(settings):
    """Every count lies within exact binomial bounds that all hold together with probability 1 - 1e-6."""
    vocab, rows, rounds = 300, 500, 200
    logits = 2.0 * jax.random.normal(jax.random.key(0), (vocab,))

    @jax.jit
    def sample(key):
        return sample_token(jnp.broadcast_to(logits, (rows, vocab)), key, **settings)

    tokens, log_probs = map(np.asarray, jax.lax.map(sample, jax.random.split(jax.random.key(1), rounds)))
    masked = np.asarray(sampling_logits(logits, **settings), np.float64)
    weights = np.exp(masked - masked.max())
    probabilities = weights / weights.sum()
    counts = np.bincount(tokens.ravel(), minlength=vocab)
    tail = 1e-6 / (2 * vocab)
    assert np.all(counts >= binom.ppf(tail, rows * rounds, probabilities))
    assert np.all(counts <= binom.isf(tail, rows * rounds, probabilities))
    assert not counts[probabilities == 0].any()
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = jnp.full((4000, 260), -jnp.inf).at[:, 130].set(0.0).at[:, 257].set(0.0)
    tokens, log_probs = jax.jit(draw)(logits, jax.random.key(0))
    assert set(np.unique(tokens)) == {130, 257}
    np.testing.assert_allclose(log_probs, np.log(0.5), atol=1e-6)


def test_temperature_zero_takes_the_first_of_the_largest():
    token, log_prob = sample_token(
        jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), jax.random.key(0), temperature=0
    )
    np.testing.assert_array_equal(token, [1, 0])
    np.testing.assert_array_equal(log_prob, [0.0, 0.0])
