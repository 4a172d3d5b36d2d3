"""Rewards, advantages and whitening: published vectors, float64 loops, masks with holes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.advantages import gae, whiten


def random_batch(seed, rows=4, length=9):
    """Float64 arrays and a mask with holes; one row is full, one has a single token, one has none."""
    random = np.random.default_rng(seed)
    mask = random.random((rows, length)) < 0.6
    mask[0], mask[1], mask[2] = True, np.arange(length) == 4, False
    return random.normal(0, 1, (3, rows, length)), mask


def gae_loop(rewards, values, mask, discount, trace):
    """The definition: a sum over the later valid tokens, no recursion."""
    advantages = np.zeros_like(rewards)
    for b in range(len(rewards)):
        valid = np.flatnonzero(mask[b])
        r, v = rewards[b, valid], np.append(values[b, valid], 0.0)
        for i, t in enumerate(valid):
            advantages[b, t] = sum(
                (discount * trace) ** (j - i) * (r[j] + discount * v[j + 1] - v[j])
                for j in range(i, len(valid))
            )
    return advantages, np.where(mask, advantages + values, 0.0)


# google-deepmind/rlax, multistep_test.py: a row with a bootstrap value, a row with a terminal inside.
RLAX_GAE = {
    1.0: ([-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0], [-4.9]),
    0.7: ([-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0], [-4.9]),
    0.4: ([0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0], [-4.9]),
}


@pytest.mark.parametrize("trace", RLAX_GAE)
def test_gae_reproduces_the_vectors_of_rlax(trace):
    """There the value after the last step is -1; here it is 0, so γ · (-1) is part of the last reward."""

    def advantages(rewards, values, discount, after):
        rewards = jnp.array(rewards).at[-1].add(discount * after)
        return gae(rewards, jnp.array(values), jnp.ones(len(values), bool), discount=discount, trace=trace)[0]

    first, second, third = RLAX_GAE[trace]
    got = advantages([0.0, 0.0, 1.0, 0.0, -0.5], [1.0, 4.0, -3.0, -2.0, -1.0], 0.99, -1.0)
    np.testing.assert_allclose(got, first, atol=1e-3)  # the vectors are rounded so
    np.testing.assert_allclose(advantages([0.0] * 4, [-3.0, -2.0, -1.0, 0.0], 0.9, 0.0), second, atol=1e-3)
    np.testing.assert_allclose(advantages([1.0], [5.0], 0.9, -1.0), third, atol=1e-3)


def test_gae_skips_the_turns_of_the_user():
    rewards = jnp.array([0.0, 0, 0, 0, 0, 1])
    values = jnp.array([0.1, 0.2, 9, 9, 0.3, 0.4])
    mask = jnp.array([True, True, False, False, True, True])
    advantages, returns = gae(rewards, values, mask, discount=0.99, trace=0.95)
    np.testing.assert_allclose(advantages, [0.773290, 0.718012, 0, 0, 0.660300, 0.600000], atol=1e-6)
    np.testing.assert_allclose(returns, [0.873290, 0.918012, 0, 0, 0.960300, 1.000000], atol=1e-6)


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_its_definition_on_masks_with_holes(discount, trace):
    (rewards, values, _), mask = random_batch(3)
    expected = gae_loop(rewards, values, mask, discount, trace)
    rewards[~mask] = np.nan  # masked garbage changes nothing
    values[~mask] = np.nan
    got = gae(jnp.array(rewards), jnp.array(values), jnp.array(mask), discount=discount, trace=trace)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-6)


def test_gae_takes_any_leading_axes_and_a_mapped_discount():
    (rewards, values, _), mask = random_batch(4)
    discounts = jnp.array([0.9, 1.0])
    mapped = jax.vmap(lambda g: gae(jnp.array(rewards), jnp.array(values), jnp.array(mask), discount=g)[0])(
        discounts
    )
    cube = gae(*(jnp.stack([jnp.array(x)] * 2) for x in (rewards, values, mask)), discount=0.9)[0]
    for i, discount in enumerate([0.9, 1.0]):
        np.testing.assert_allclose(mapped[i], gae_loop(rewards, values, mask, discount, 0.95)[0], atol=2e-6)
    np.testing.assert_allclose(cube[1], mapped[0], atol=1e-6)


def test_more_padding_changes_no_advantage():
    (rewards, values, _), mask = random_batch(5)
    pad = ((0, 0), (0, 3))
    longer = gae(*(jnp.pad(jnp.array(x), pad) for x in (rewards, values, mask)))
    shorter = gae(jnp.array(rewards), jnp.array(values), jnp.array(mask))
    np.testing.assert_array_equal(longer[0][:, :-3], shorter[0])


def test_whitening_follows_the_golden_numbers():
    x, mask = jnp.array([1.0, 2.0, 3.0, 100.0]), jnp.array([True, True, True, False])
    np.testing.assert_allclose(whiten(x, mask), [-1.0, 0.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), [1.0, 2.0, 3.0, 0.0], atol=1e-6)


def test_whitening_is_over_all_rows_at_once():
    (x, _, _), mask = random_batch(7)
    valid = [float(v) for v in x[mask]]
    mean = sum(valid) / len(valid)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in valid) / (len(valid) - 1))
    expected = np.where(mask, (x - mean) / deviation, 0.0)
    x[~mask] = np.nan
    np.testing.assert_allclose(whiten(jnp.array(x), jnp.array(mask)), expected, atol=2e-6)


@pytest.mark.parametrize("x", [[3.0], [0.5, 0.5, 0.5], [87.3] * 64, [1000.1] * 64])
def test_whitening_one_item_or_equal_ones_gives_zero(x):
    x = jnp.array([*x, jnp.nan])
    mask = jnp.arange(len(x)) < len(x) - 1
    np.testing.assert_array_equal(whiten(x, mask), 0.0)
    np.testing.assert_array_equal(whiten(x, mask, shift_mean=False), jnp.where(mask, x, 0.0))
    np.testing.assert_array_equal(whiten(x, jnp.zeros_like(mask)), 0.0)
