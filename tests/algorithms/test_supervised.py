"""Cross-entropy as a sum, and the shift between logits and targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.supervised import next_token_targets, token_cross_entropy


def identity(logits):
    return logits


def test_a_logit_is_compared_with_the_token_after_it():
    tokens = jnp.array([[5, 6, 7, 0]])
    targets, mask = next_token_targets(tokens, jnp.array([[True, False, True, False]]))
    np.testing.assert_array_equal(targets, [[6, 7, 0]])
    np.testing.assert_array_equal(mask, [[False, True, False]])  # the first token is never a target


def test_a_model_that_knows_the_next_token_has_no_loss():
    tokens = jnp.array([[3, 1, 2, 0, 1]])
    logits = 100.0 * jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 4)
    targets, mask = next_token_targets(tokens, jnp.ones((1, 5), bool))
    loss = token_cross_entropy(identity, logits[:, :-1], targets, mask, 4)
    assert float(loss.mean()) == pytest.approx(0.0, abs=1e-6)


def test_cross_entropy_equals_a_float64_loop_with_its_gradient():
    random = np.random.default_rng(1)
    logits, targets = random.normal(0, 2, (3, 6, 5)), random.integers(0, 5, (3, 6))
    mask = random.random((3, 6)) < 0.6
    total, gradient = 0.0, np.zeros_like(logits)
    for b, t in zip(*np.nonzero(mask), strict=True):
        exps = [math.exp(x) for x in logits[b, t]]
        total -= math.log(exps[targets[b, t]] / sum(exps))
        gradient[b, t] = [e / sum(exps) - (v == targets[b, t]) for v, e in enumerate(exps)]

    logits[~mask] = np.nan  # masked garbage changes nothing
    targets[~mask] = -100

    def loss(logits):
        found = token_cross_entropy(identity, logits, jnp.asarray(targets), jnp.asarray(mask), 5)
        return found.total, found

    (_, found), got = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits, jnp.float32))
    assert float(found.total) == pytest.approx(total, rel=1e-6)
    assert float(found.weight) == mask.sum()
    np.testing.assert_allclose(got, gradient, atol=1e-6)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    targets, mask = jnp.zeros((2, 3), int), jnp.ones((2, 3), bool)
    loss = token_cross_entropy(identity, jnp.zeros((2, 3, 11)), targets, mask, 11)
    assert math.exp(float(loss.mean())) == pytest.approx(11, rel=1e-5)
