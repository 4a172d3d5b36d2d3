"""Rotary positions: known turns, and scores that depend on the distance alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.rope import rotary_table, rotate


def _random(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_rotary_scores_depend_only_on_the_distance():
    q, k = _random((1, 1, 1, 8), (1, 1, 1, 8))

    @jax.jit
    def score(i, j):
        at = lambda p: rotary_table(jnp.array([[p]]), 8, 10_000.0)  # noqa: E731
        return jnp.sum(rotate(q, at(i)) * rotate(k, at(j)))

    assert score(7, 3) == pytest.approx(float(score(104, 100)), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_rotary_turns_the_first_pair_by_one_radian_a_position():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    turned = jax.jit(lambda x: rotate(x, rotary_table(jnp.array([[1]]), 4, 10_000.0)))(x)
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1.0), 0.0, np.sin(1.0), 0.0], atol=1e-6)
