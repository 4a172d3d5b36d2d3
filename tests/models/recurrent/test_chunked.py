"""Cells that read rows in chunks: in chunks, in pieces and step by step they follow their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.recurrent.cell import Cell, Flow
from hybrid_jax.models.recurrent.gated_deltanet import GatedDeltaNet
from hybrid_jax.models.recurrent.mamba2 import Mamba2, state_space

W, B, T = 6, 2, 23
KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(0, 1, (T, B, W)).astype(np.float32)
# Padding before, between and within sequences: the second row of a conversation pauses within segment 1.
SEGMENTS = np.array([[0, 0] + [1] * 9 + [0] + [2] * 10 + [3], [1] * 4 + [0] * 3 + [1] * 7 + [2] * 9]).T
BEGINS = np.zeros_like(SEGMENTS, bool)
BEGINS[[2, 12, 22], 0] = BEGINS[[0, 14], 1] = True
FLOW = Flow(jnp.asarray(SEGMENTS > 0), jnp.asarray(BEGINS))


def _mamba2(length=5):
    return Mamba2(
        width=W, head_width=3, state_width=4, groups=2, convolution_width=3, chunk_length=length, bias=True
    ).cell()


def _gated_deltanet(length=5):
    return GatedDeltaNet(
        width=W,
        key_heads=2,
        value_heads=4,
        key_width=4,
        value_width=3,
        convolution_width=3,
        chunk_length=length,
    ).cell()


CELLS = {"mamba2": _mamba2, "gated_deltanet": _gated_deltanet}


@pytest.fixture(params=CELLS)
def make(request):
    return CELLS[request.param]


def _random_params(cell):
    """Large enough that states, decays and convolutions matter."""
    shapes = jax.eval_shape(lambda: cell.init(KEY, W))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.6, leaf.shape), jnp.float32), shapes)


def _silu(x):
    return x / (1 + np.exp(-x))


def _sequences(segments):
    """(row, places) of every sequence."""
    for row in range(B):
        for number in range(1, segments.max() + 1):
            if len(places := np.flatnonzero(segments[:, row] == number)):
                yield row, places


def _mamba2_in_float64(params, x):
    """The equations of `Mamba2Cell`, token by token, for one sequence [T W]."""
    params = jax.tree.map(np.float64, params)
    e, h, p, g, n = 12, 4, 3, 2, 4
    products = x @ params["input"]["kernel"] + params["input"]["bias"]
    z, channels, delta = np.split(products, [e, e + e + 2 * g * n], axis=1)
    taps = params["convolution"]["taps"]
    padded = np.concatenate([np.zeros((2, channels.shape[1])), channels])
    state, outputs = np.zeros((h, p, n)), []
    for t in range(len(x)):
        now = _silu((taps * padded[t : t + 3]).sum(0) + params["convolution"]["bias"])
        value, b, c = np.split(now, [e, e + g * n])
        value, b, c = value.reshape(h, p), b.reshape(g, n), c.reshape(g, n)
        step = np.log1p(np.exp(delta[t] + params["time_step"]["bias"]))
        y = np.zeros((h, p))
        for i in range(h):
            decay = np.exp(-np.exp(params["decay"]["log_rate"][i]) * step[i])
            state[i] = decay * state[i] + step[i] * np.outer(value[i], b[i // 2])
            y[i] = state[i] @ c[i // 2] + params["skip"]["scale"][i] * value[i]
        y = (y.reshape(e) * _silu(z[t])).reshape(g, e // g)
        y = (y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)).reshape(e) * params["norm"]["scale"]
        outputs.append(y @ params["projection"]["kernel"] + params["projection"]["bias"])
    return np.array(outputs), state


def _gated_deltanet_in_float64(params, x):
    """The equations of `GatedDeltaNetCell`, token by token, for one sequence [T W]."""
    params = jax.tree.map(np.float64, params)
    h, n, p = 4, 4, 3
    products = x @ params["input"]["kernel"]
    channels, z, b, delta = np.split(products, [2 * 2 * n + h * p, 2 * 2 * n + 2 * h * p, -h], axis=1)
    taps = params["convolution"]["taps"]
    padded = np.concatenate([np.zeros((2, channels.shape[1])), channels])
    unit = lambda each: each / np.sqrt((each**2).sum(1, keepdims=True) + 1e-6)  # noqa: E731
    state, outputs = np.zeros((h, n, p)), []
    for t in range(len(x)):
        q, k, v = np.split(_silu((taps * padded[t : t + 3]).sum(0)), [2 * n, 4 * n])
        q, k, v = unit(q.reshape(2, n)) / 2, unit(k.reshape(2, n)), v.reshape(h, p)
        y = np.zeros((h, p))
        for i in range(h):
            step = np.log1p(np.exp(delta[t, i] + params["time_step"]["bias"][i]))
            state[i] *= np.exp(-np.exp(params["decay"]["log_rate"][i]) * step)
            error = (v[i] - state[i].T @ k[i // 2]) / (1 + np.exp(-b[t, i]))
            state[i] += np.outer(k[i // 2], error)
            y[i] = state[i].T @ q[i // 2]
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-6) * params["norm"]["scale"]
        outputs.append((y.reshape(-1) * _silu(z[t])) @ params["projection"]["kernel"])
    return np.array(outputs), state


ORACLES = {_mamba2: _mamba2_in_float64, _gated_deltanet: _gated_deltanet_in_float64}


@pytest.mark.parametrize("length", [1, 5, 64])
def test_packed_rows_in_chunks_follow_the_equations_in_float64(make, length):
    """Each sequence by itself, in its real tokens alone, is what the oracle reads."""
    cell = make(length)
    params = _random_params(cell)
    y, (_, state) = jax.jit(cell.read)(params, X, cell.start(B), FLOW)
    for row, places in _sequences(SEGMENTS):
        expected, last = ORACLES[make](params, np.float64(X[places, row]))
        np.testing.assert_allclose(y[places, row], expected, atol=3e-5)
        if SEGMENTS[-1, row] == SEGMENTS[places[0], row]:
            np.testing.assert_allclose(state[row], last, atol=1e-5)


@pytest.mark.parametrize("flow", [None, FLOW], ids=["one segment", "packed"])
def test_chunks_are_the_steps_with_their_gradient(make, flow):
    cell = make()
    params, start = _random_params(cell), cell.start(B)
    start = jax.tree.map(lambda leaf: leaf + 0.3, start)
    real = 1.0 if flow is None else flow.real[..., None]

    def loss(read, params, x, start):
        y, state = read(cell, params, x, start, flow)
        return jnp.sum((y * real) ** 2), (y * real, state)

    # A packed row begins from `Cell.start`, so that only rows without a beginning go on from another state.
    start = start if flow is None else cell.start(B)
    sides = [
        jax.jit(
            jax.value_and_grad(lambda *args, r=read: loss(r, *args), argnums=(0, 1, 2), has_aux=True)
        )(params, X, start)
        for read in (type(cell).read, Cell.read)
    ]  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), *sides)


def test_a_row_read_in_pieces_is_the_row_read_at_once(make):
    cell = make()
    params, pieces, state = _random_params(cell), [], cell.start(B)
    read = jax.jit(cell.read)
    whole, last = read(params, X, state)
    for start, end in ((0, 1), (1, T)):
        y, state = read(params, X[start:end], state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


def test_padding_alone_leaves_a_state_as_it_is_bit_by_bit(make):
    cell = make()
    start = jax.tree.map(lambda leaf: leaf + 0.3, cell.start(B))
    _, state = jax.jit(cell.read)(_random_params(cell), X, start, Flow(jnp.zeros((T, B), bool)))
    jax.tree.map(np.testing.assert_array_equal, state, start)


@pytest.mark.parametrize("reset", [-100.0, -1e4])
def test_chunks_keep_their_digits_behind_decays_that_all_but_empty_a_state(reset):
    """Sums of all decays from the start of a chunk would swallow the small ones."""
    log_decay = np.full(64, -1e-3)
    log_decay[::8] = reset
    state, expected = 0.0, []
    for each in log_decay:
        state = np.exp(each) * state + 1.0
        expected.append(state)
    ones = jnp.ones((64, 1, 1, 1))
    decay = jnp.asarray(log_decay, jnp.float32)[:, None, None]
    start, segment = jnp.zeros((1, 1, 1, 1)), jnp.zeros((64, 1), jnp.int32)
    y, last = jax.jit(state_space, static_argnums=6)(ones, decay, ones, ones, start, segment, 64)
    np.testing.assert_allclose(y[:, 0, 0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(last[0, 0, 0, 0], expected[-1], rtol=1e-6)


def test_decays_that_underflow_have_a_gradient(make):
    """e^-1000 between neighbours, above the diagonal e^+1000: neither becomes NaN."""
    cell = make()
    params = _random_params(cell)
    params["decay"]["log_rate"] += 9.0
    loss = lambda params: jnp.sum(cell.read(params, X, cell.start(B), FLOW)[0] ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_gated_deltanet_layer_is_that_of_qwen3_next():
    """With the parameters of ours put where theirs are: by key head, and the decays in a map of their own."""
    import torch
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    cell = _gated_deltanet(64)
    params = _random_params(cell)
    config = Qwen3NextConfig(
        hidden_size=W,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=3,
        linear_conv_kernel_dim=3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    layer = theirs.Qwen3NextGatedDeltaNet(config, 0).eval()
    parts = np.split(np.asarray(params["input"]["kernel"]).T, np.cumsum([8, 8, 12, 12, 4]))
    by_head = [part.reshape(2, -1, W) for part in parts]
    tensors = {
        "in_proj_qkvz.weight": np.concatenate(by_head[:4], axis=1).reshape(-1, W),
        "in_proj_ba.weight": np.concatenate(by_head[4:], axis=1).reshape(-1, W),
        "conv1d.weight": np.asarray(params["convolution"]["taps"]).T[:, None],
        "dt_bias": params["time_step"]["bias"],
        "A_log": params["decay"]["log_rate"],
        "norm.weight": params["norm"]["scale"],
        "out_proj.weight": np.asarray(params["projection"]["kernel"]).T,
    }
    layer.load_state_dict({name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()})
    with torch.no_grad():
        expected = layer(torch.as_tensor(X).swapaxes(0, 1)).swapaxes(0, 1).numpy()
    y, _ = jax.jit(cell.read)(params, X, cell.start(B))
    np.testing.assert_allclose(y, expected, atol=2e-5)
