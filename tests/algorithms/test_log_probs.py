"""Log-probabilities and entropies against float64 numpy, finite differences and literal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.log_probs import entropy, token_log_probs

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (2, 5, 7))
TARGETS = RANDOM.integers(0, 7, (2, 5))
COTANGENT = RANDOM.normal(0, 1, (2, 5))


def log_probs_of(logits):
    """float64, one row at a time."""
    result = np.empty_like(logits)
    for index in np.ndindex(*logits.shape[:-1]):
        row = logits[index]
        result[index] = row - row.max() - np.log(sum(np.exp(x - row.max()) for x in row))
    return result


def chosen_of(logits):
    return np.take_along_axis(log_probs_of(logits), TARGETS[..., None], -1)[..., 0]


def entropy_of(logits):
    log_probs = log_probs_of(logits)
    return -(np.exp(log_probs) * log_probs).sum(-1)


def slopes(function, x, step=1e-5):
    """Central differences of Σ cotangent · function in float64."""
    result = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = ((function(up) - function(down)) * COTANGENT).sum() / (2 * step)
    return result


CASES = {
    "token_log_probs": (lambda x: token_log_probs(x, jnp.asarray(TARGETS)), chosen_of),
    "entropy": (entropy, entropy_of),
}


@pytest.mark.parametrize("name", CASES)
def test_values_equal_a_float64_loop(name):
    ours, oracle = CASES[name]
    np.testing.assert_allclose(ours(jnp.asarray(LOGITS, jnp.float32)), oracle(LOGITS), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_finite_differences(name):
    ours, oracle = CASES[name]
    _, pull = jax.vjp(ours, jnp.asarray(LOGITS, jnp.float32))
    got = pull(jnp.asarray(COTANGENT, jnp.float32))[0]
    np.testing.assert_allclose(got, slopes(oracle, LOGITS), atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_scan_vmap_and_jit_change_nothing(name):
    logits = jnp.asarray(LOGITS, jnp.float32)
    function = {"token_log_probs": token_log_probs, "entropy": lambda x, _: entropy(x)}[name]
    grad = jax.grad(lambda x, y: jnp.sum(function(x, y) * jnp.arange(5.0)))
    whole = jnp.stack([grad(x, y) for x, y in zip(logits, jnp.asarray(TARGETS), strict=True)])
    mapped = jax.jit(jax.vmap(grad))(logits, jnp.asarray(TARGETS))
    _, scanned = jax.lax.scan(lambda c, xy: (c, grad(*xy)), None, (logits, jnp.asarray(TARGETS)))
    np.testing.assert_allclose(mapped, whole, atol=1e-6)
    np.testing.assert_allclose(scanned, whole, atol=1e-6)


def test_log_probs_of_a_known_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2])) + 7.0
    np.testing.assert_allclose(
        token_log_probs(jnp.stack([logits] * 3), jnp.arange(3)), np.log([0.5, 0.3, 0.2]), rtol=1e-5
    )
    assert float(entropy(logits)) == pytest.approx(1.0296530, abs=1e-6)  # −Σ p log p


def test_large_logits_stay_exact():
    logits = jnp.array([[1000.0, 998.0, -1000.0]])
    assert float(token_log_probs(logits, jnp.array([1]))[0]) == pytest.approx(-2.126928, abs=1e-6)
    assert float(entropy(logits)[0]) == pytest.approx(0.365335, abs=1e-5)  # two words at odds e² : 1


def test_excluded_words_have_no_entropy_and_no_gradient():
    logits = jnp.array([0.0, 0.0, -jnp.inf])
    value, gradient = jax.value_and_grad(entropy)(logits)
    assert float(value) == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(gradient, [0.0, 0.0, 0.0], atol=1e-7)
    np.testing.assert_allclose(
        jax.grad(lambda x: token_log_probs(x, jnp.array(0)))(logits), [0.5, -0.5, 0.0], atol=1e-6
    )


@pytest.mark.parametrize("padding", [-100, -1, 3, 10**6])
def test_targets_outside_the_vocabulary_are_harmless_once_masked(padding):
    logits = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    mask = jnp.array([True, False])

    def total(logits, targets):
        return jnp.sum(jnp.where(mask, token_log_probs(logits, targets), 0.0))

    value, gradient = jax.value_and_grad(total)(logits, jnp.array([2, padding]))
    assert float(value) == pytest.approx(-0.4076060, abs=1e-6)
    np.testing.assert_allclose(gradient[0], [-0.0900306, -0.2447285, 0.3347590], atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0.0)
    assert np.isfinite(token_log_probs(logits, jnp.array([2, padding]))).all()


def test_half_precision_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 40_000), jnp.bfloat16)  # a bfloat16 sum of ones stops at 256
    got = token_log_probs(logits, jnp.array([0]))
    assert got.dtype == jnp.float32
    assert float(got[0]) == pytest.approx(-np.log(40_000), rel=1e-6)
