"""However losses are added up, masked tokens get no gradient and no division of the batch changes one."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.aggregation import Aggregation, loss_weights
from hybrid_jax.algorithms.policy_gradient import Clipped, token_losses

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
GROUP = np.array([0, 0, 2, 2])
DRAW = np.random.default_rng(0)
NOW, OLD, ADVANTAGES = (np.where(MASK, DRAW.normal(size=MASK.shape), np.nan) for _ in range(3))


def gradient(kind, rows, pad=0):
    """Of the loss over the whole batch, by the log-probabilities of some rows; ``pad`` masked rows follow."""
    fill = [(0, pad), (0, 0)]
    now, old, advantages = (np.pad(x, fill, constant_values=np.nan) for x in (NOW, OLD, ADVANTAGES))
    mask, group = np.pad(MASK, fill), np.pad(GROUP, (0, pad), constant_values=len(MASK))
    weights, shares = loss_weights(kind, jnp.asarray(mask), jnp.asarray(group))

    def loss(log_probs):
        losses, _ = token_losses(Clipped(), log_probs, old[rows], advantages[rows], jnp.asarray(mask[rows]))
        return jnp.sum(jnp.where(mask[rows], weights[rows] * losses, 0.0)) / shares.sum()

    return np.asarray(jax.grad(loss)(jnp.asarray(now[rows])))


@pytest.mark.parametrize("kind", get_args(Aggregation))
def test_masked_tokens_get_no_gradient_and_parts_give_that_of_the_whole(kind):
    whole = gradient(kind, np.arange(4))
    assert (whole[~MASK] == 0).all()
    assert np.abs(whole[MASK]).sum() > 0
    halves = np.concatenate([gradient(kind, np.arange(2)), gradient(kind, np.arange(2, 4))])
    np.testing.assert_allclose(halves, whole, atol=1e-7)
    np.testing.assert_allclose(gradient(kind, np.arange(6), pad=2)[:4], whole, atol=1e-7)
