"""Mixtures of experts against a loop over tokens, and the router's losses against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Dispatch, Experts, choose_experts, router_losses

TOKENS, EXPERTS, K, WIDTH, INNER = 9, 5, 2, 4, 3


def _arrays():
    random = np.random.default_rng(0)
    shapes = ((TOKENS, WIDTH), (TOKENS, EXPERTS), (EXPERTS, WIDTH, INNER), (EXPERTS, INNER))
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


losses_of_a_router = jax.jit(router_losses)


@jax.jit
def _mixture(x, scores, kernel, bias):
    weights, chosen = choose_experts(scores, K, normalize=True)
    dispatch = Dispatch.of(chosen, EXPERTS)
    return dispatch.gather(dispatch.product(dispatch.scatter(x), kernel, bias), weights)


def test_every_token_goes_through_its_own_experts_and_none_is_dropped():
    x, scores, kernel, bias = _arrays()
    scores[:, 3] += 10.0  # all tokens want expert 3: no capacity bounds it
    expected = np.zeros((TOKENS, INNER))
    for n in range(TOKENS):
        probs = np.exp(scores[n]) / np.exp(scores[n]).sum()
        best = np.argsort(-probs)[:K]
        for e in best:
            expected[n] += probs[e] / probs[best].sum() * (x[n] @ kernel[e] + bias[e])
    np.testing.assert_allclose(_mixture(x, scores, kernel, bias), expected, atol=1e-5)


def test_without_normalising_the_weights_are_probabilities_over_all_experts():
    weights, chosen = choose_experts(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), 2, normalize=False)
    np.testing.assert_allclose(weights, [[0.5, 0.3]], atol=1e-6)
    assert chosen.tolist() == [[0, 2]]


def test_the_balance_loss_of_one_full_row_is_that_of_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = np.random.default_rng(1).normal(size=(1, 16, EXPERTS)).astype(np.float32)
    _, chosen = choose_experts(jnp.asarray(scores[0]), K, normalize=True)
    losses = losses_of_a_router(scores, chosen[None], np.ones((1, 16), bool))
    expected = load_balancing_loss_func((torch.as_tensor(scores[0]),), EXPERTS, K)
    assert float(losses["router_balance"].mean()) == pytest.approx(float(expected), rel=1e-6)


def test_router_losses_know_no_padding_and_add_up_over_rows():
    scores = np.random.default_rng(2).normal(size=(2, 6, EXPERTS)).astype(np.float32)
    real = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], bool)
    _, chosen = choose_experts(jnp.asarray(scores), K, normalize=True)
    both = losses_of_a_router(scores, chosen, real)
    rows = [
        losses_of_a_router(scores[i : i + 1, 6 - n :], chosen[i : i + 1, 6 - n :], np.ones((1, n), bool))
        for i, n in ((0, 6), (1, 3))
    ]
    total = jax.tree.map(jnp.add, *rows)
    for name, loss in both.items():
        assert float(loss.total) == pytest.approx(float(total[name].total), rel=1e-6), name
        assert float(loss.weight) == 9
    z = sum(np.log(np.exp(scores[b, t]).sum()) ** 2 for b in range(2) for t in range(6) if real[b, t])
    assert float(both["router_z"].total) == pytest.approx(z, rel=1e-5)


def test_experts_used_alike_have_the_balance_loss_k():
    chosen = jnp.array([[[0, 1], [2, 3]]])
    losses = losses_of_a_router(jnp.zeros((1, 2, 4)), chosen, jnp.ones((1, 2), bool))
    assert float(losses["router_balance"].mean()) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 2, "per_token": 3}, "per_token must be at most count=2, got 3"),
        ({"count": 0, "per_token": 1}, "count must be in \\[1, 1048576\\], got 0"),
    ],
)
def test_impossible_mixtures_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Experts(width=4, **settings)


def test_a_model_names_the_losses_that_it_wants_trained_and_averages_its_layers():
    experts = Experts(count=4, per_token=2, width=8, balance_coef=0.01)
    config = DecoderConfig(num_layers=2, width=16, num_heads=2, norm="rms", mlp="gated", experts=experts)
    model = config.build(11)
    assert model.loss_coefs == {"router_balance": 0.01}
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(10).reshape(2, 5) % 11
    _, losses = jax.jit(model.hidden_and_losses)(params, tokens)
    assert losses.keys() == {"router_balance"}
    assert float(losses["router_balance"].weight) == 10
    # barely different scores: nearly balanced, and the mean over two layers, not their sum
    assert float(losses["router_balance"].mean()) == pytest.approx(2.0, abs=0.3)
