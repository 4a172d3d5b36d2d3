"""What every recurrent language model keeps to: packed rows, padding, dropout, arithmetic, many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.flops import forward_flops, matmul_parameters, train_flops
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.recurrent.elman import Elman
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.parallel.mesh import MeshConfig
from hybrid_jax.parallel.rules import under

V, KEY = 11, jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, V, (1, 12))
TWO = LSTM(num_layers=2, width=8).build(V)  # layers
PARAMS = TWO.init(KEY)


def test_a_packed_row_is_its_sequences_bit_by_bit():
    """Three sequences with padding before, between and behind them."""
    segments = jnp.array([[0, 1, 1, 1, 0, 2, 2, 3, 3, 3, 3, 0]])
    hidden = jax.jit(TWO.hidden)(PARAMS, TOKENS, segments)
    for number in (1, 2, 3):
        at = np.flatnonzero(segments[0] == number)
        alone = jax.jit(TWO.hidden)(PARAMS, TOKENS[:, at])
        np.testing.assert_array_equal(hidden[:, at], alone)


def test_padding_leaves_the_state_as_it_is_bit_by_bit():
    cache = TWO.init_cache(1, 9)
    extend = jax.jit(TWO.extend)
    _, padded = extend(PARAMS, TOKENS[:, :4], jnp.zeros((1, 4), bool), cache)
    jax.tree.map(np.testing.assert_array_equal, padded.state, cache.state)
    _, read = extend(PARAMS, TOKENS, jnp.ones((1, 12), bool), cache)
    _, behind = extend(PARAMS, TOKENS[:, :4], jnp.zeros((1, 4), bool), read)
    jax.tree.map(np.testing.assert_array_equal, behind.state, read.state)


def test_a_turn_read_behind_padding_goes_on_with_the_row():
    """In a row of a conversation padding stands between turns of one segment: nothing begins anew there."""
    real = jnp.array([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    hidden = TWO.hidden(PARAMS, TOKENS, real)
    together = TWO.hidden(PARAMS, np.delete(TOKENS, [3, 4], axis=1))
    np.testing.assert_array_equal(hidden[:, 5:], together[:, 3:])


def test_variational_dropout_has_one_mask_a_row_and_none_without_a_key():
    model = Elman(width=64, dropout=0.5).build(V)
    params = model.init(KEY)
    params["layer_0"]["cell"]["input"]["bias"] += 1.0  # so that no output is zero by itself
    hidden = model.hidden(params, TOKENS, dropout_key=KEY)
    gone = np.asarray(hidden[0] == 0)
    np.testing.assert_array_equal(gone, np.broadcast_to(gone[0], gone.shape))
    assert 16 < gone[0].sum() < 48  # of 64
    assert not (model.hidden(params, TOKENS) == 0).any()
    each = (
        Elman(width=64, dropout=0.5, variational_dropout=False).build(V).hidden(params, TOKENS, dropout_key=KEY)
    )
    assert np.ptp(np.sum(each[0] == 0, axis=1)) > 0


def test_dropout_of_recurrent_weights_is_that_of_a_smaller_kernel():
    config = Elman(width=16, recurrent_dropout=0.25)
    params = config.build(V).init(KEY)["layer_0"]["cell"]
    kernel, dropped = (p["recurrent"]["kernel"] for p in (params, config.dropped(params, KEY)))
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped, kernel * kept / 0.75, rtol=1e-6)
    assert 0.65 < kept.mean() < 0.85
    model = config.build(V)
    assert (
        np.abs(
            model.hidden({**model.init(KEY)}, TOKENS, dropout_key=KEY) - model.hidden(model.init(KEY), TOKENS)
        ).max()
        > 0.01
    )


def test_the_arithmetic_of_a_token_is_counted_by_hand():
    config = LSTM(num_layers=2, width=4, embedding_width=3, vocab_size=V)
    n = 3 * 16 + 4 * 16 + (4 * 16 + 4 * 16) + 4 * V
    assert matmul_parameters(config) == n
    assert forward_flops(config, tokens=10, length=5) == 2 * n * 10
    assert forward_flops(config, 10, 5, head_tokens=0) == 2 * (n - 4 * V) * 10
    assert train_flops(config, 10, 5) == 6 * n * 10
    # Added to a number on the device, a whole number above 2^31 would not fit.
    assert float(jax.jit(lambda x: x + train_flops(config, 10**9, 5))(1.0)) > 2**31
    tied = Elman(width=4, tie_embeddings=True, vocab_size=V)
    assert matmul_parameters(tied) == 16 + 16 + 4 * V


def test_eight_devices_give_the_states_and_gradients_of_one():
    model = GRU(num_layers=2, width=16, residual=True, mlp_width=32).build(16)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 16, (8, 6)))
    placement = MeshConfig(data=2, fsdp=2, tensor=2).placement()

    def loss(params):
        return jnp.sum(model.apply(params, tokens, tokens > 3).logits ** 2)

    params = model.init(KEY)
    alone = jax.jit(jax.value_and_grad(loss))(params)
    placed = jax.device_put(params, placement.shardings(params, param_axes))
    kernel = placed["layer_0"]["cell"]["recurrent"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 48)  # split over fsdp
    many = jax.jit(under(placement, jax.value_and_grad(loss)))(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), alone, many)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSTM(mlp_width=8), "mlp_width needs residual: true"),
        (lambda: LSTM(embedding_width=8, width=4, tie_embeddings=True), "embedding_width must be null or 4"),
        (lambda: GRU(layer_norm=True), "layer_norm needs reset: after"),
        (lambda: Elman().build(None), "vocab_size is missing"),
        (lambda: Elman(vocab_size=3).build(5), "vocab_size must be at least the tokenizer's 5, got 3"),
    ],
)
def test_what_does_not_fit_together_is_one_line(make, message):
    with pytest.raises((UserError, ValueError), match=message):
        make()
