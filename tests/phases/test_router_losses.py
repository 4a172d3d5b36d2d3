"""A mixture of experts is trained with its router's losses, divided like every other loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.phases.sft import sft_objective
from hybrid_jax.training.update import gradients


def test_the_balance_loss_adds_its_gradient_whatever_the_microbatches():
    experts = Experts(count=3, per_token=1, width=4, balance_coef=0.5)
    config = DecoderConfig(num_layers=1, width=8, num_heads=2, norm="rms", mlp="gated", experts=experts)
    model = config.build(11)
    params = {"model": model.init(jax.random.key(0))}
    random = np.random.default_rng(0)
    segments = jnp.asarray(np.where(np.arange(6) < np.array([[6], [4], [6], [2]]), 1, 0))
    tokens = jnp.asarray(random.integers(0, 11, (4, 6)))
    batch = TokenBatch(tokens, segments, segments.astype(bool).at[:, 0].set(False))

    def balance(params):
        hidden, losses = model.hidden_and_losses(params["model"], tokens, segments)
        return losses["router_balance"].mean(), hidden

    key = jax.random.key(1)
    (whole, metrics), (parts, _), plain, ((mean, _), router) = jax.jit(
        lambda params: (
            gradients(sft_objective(model), params, batch, key),
            gradients(sft_objective(model), params, batch, key, 2),
            gradients(_without_router(model), params, batch, key)[0],
            jax.value_and_grad(balance, has_aux=True)(params),
        )
    )(params)
    assert float(metrics["router_balance"]) == pytest.approx(float(mean), rel=1e-5)
    expected = jax.tree.map(lambda a, b: a + 0.5 * b, plain, router)
    for got in (whole, parts):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(router)) > 1e-4


def _without_router(model):
    from dataclasses import replace

    objective = sft_objective(model)
    return replace(objective, coefs={**objective.coefs, "router_balance": 0.0})
