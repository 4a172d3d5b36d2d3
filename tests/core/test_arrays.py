"""A Sum is divided once, at the end."""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.arrays import Sum


def test_a_sum_counts_only_what_the_mask_keeps():
    total = Sum.of(jnp.array([1.0, 2.0, jnp.nan, 100.0]), jnp.array([True, True, False, False]))
    assert (float(total.total), float(total.weight), float(total.mean())) == (3.0, 2.0, 1.5)


def test_the_mean_of_nothing_is_zero():
    assert float(Sum.of(jnp.array([jnp.inf]), jnp.array([False])).mean()) == 0.0


def test_sums_of_unequal_parts_add_up_to_the_sum_of_the_whole():
    x, mask = jnp.array([1.0, 2.0, 3.0, 10.0]), jnp.array([True, True, True, True])
    parts = Sum.of(x[:3], mask[:3]) + Sum.of(x[3:], mask[3:])
    assert float(parts.mean()) == 4.0  # the mean of the two means would be 6


def test_a_sum_is_a_tree_that_passes_through_jit_and_grad():
    mask = jnp.array([True, False, True])
    gradient = jax.jit(jax.grad(lambda x: Sum.of(x * x, mask).mean()))(jnp.array([3.0, jnp.nan, 5.0]))
    np.testing.assert_array_equal(np.asarray(gradient)[[0, 2]], [3.0, 5.0])
