"""The cells of recurrent models against Flax, PyTorch and the numbers that their papers' equations give."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.recurrent.elman import ElmanCell
from hybrid_jax.models.recurrent.gru import GRUCell
from hybrid_jax.models.recurrent.lstm import LSTMCell

torch = pytest.importorskip("torch")

INPUTS, W, B, T = 3, 4, 2, 7
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1, (T, B, INPUTS)).astype(np.float32)


def size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def random(cell: Any, inputs: int = INPUTS) -> Any:
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: cell.init(KEY, inputs))
    return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


def outputs_and_gradients(cell: Any, params: Any) -> tuple[Any, Any, Any]:
    """What the cell gives, and the gradients of Σ y² with respect to parameters and inputs."""

    def loss(params, x):
        y, _ = cell.read(params, x, cell.start(B))
        return jnp.sum(y**2), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, X)
    return y, *grads


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        (LSTMCell(W, W), 3 * 16 + 4 * 16 + 16),
        (GRUCell(W, "after"), 3 * 12 + 4 * 12 + 12 + 4),
        (GRUCell(W, "before"), 3 * 12 + 4 * 12 + 12),
        (ElmanCell(W), 3 * 4 + 4 * 4 + 4),
        (LSTMCell(2, W), 3 * 16 + 2 * 16 + 16 + 4 * 2),
    ],
)
def test_a_cell_has_the_parameters_that_its_equations_need(cell, count):
    assert size(cell.init(KEY, INPUTS)) == count


def test_flax_counts_the_same_parameters():
    """128 of an LSTM, 100 of a GRU and 32 of a simple cell."""
    for ours, theirs, count in (
        (LSTMCell(W, W), nn.LSTMCell(W), 128),
        (GRUCell(W, "after"), nn.GRUCell(W), 100),
        (ElmanCell(W), nn.SimpleCell(W), 32),
    ):
        variables = theirs.init(KEY, theirs.initialize_carry(KEY, (B, INPUTS)), X[0])
        assert size(ours.init(KEY, INPUTS)) == size(variables) == count


def test_the_forget_gate_begins_open_and_recurrent_maps_orthogonal():
    params = LSTMCell(W, W, forget_bias=1.0).init(KEY, INPUTS)
    np.testing.assert_array_equal(params["input"]["bias"], [0.0] * W + [1.0] * W + [0.0] * 2 * W)
    for kernel in np.split(params["recurrent"]["kernel"], 4, axis=1):
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(W), atol=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("reset", ["before", "after"])
def test_a_gru_follows_its_equations_in_float64(reset):
    cell = GRUCell(W, reset)
    params = random(cell)
    arrays = (params["input"]["kernel"], params["input"]["bias"], params["recurrent"]["kernel"])
    kernels, b, u = (np.split(np.float64(x), 3, -1) for x in arrays)
    late = params["candidate"]["bias"] if reset == "after" else 0.0
    h, expected = np.zeros((B, W)), []
    for x in X:
        r, z = (sigmoid(x @ kernels[i] + b[i] + h @ u[i]) for i in (0, 1))
        product = (r * h) @ u[2] if reset == "before" else r * (h @ u[2] + late)
        n = np.tanh(x @ kernels[2] + b[2] + product)
        h = (1 - z) * h + z * n if reset == "before" else (1 - z) * n + z * h
        expected.append(h)
    np.testing.assert_allclose(cell.read(params, X, cell.start(B))[0], expected, atol=1e-6)


def test_an_lstm_with_norms_and_a_projection_follows_its_equations_in_float64():
    cell = LSTMCell(2, W, layer_norm=True)
    p = jax.tree.map(np.float64, random(cell))

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[name]["scale"] + p[name]["bias"]

    h, c, expected = np.zeros((B, 2)), np.zeros((B, W)), []
    for x in X:
        of_x = norm("norm_input", x @ p["input"]["kernel"]) + p["input"]["bias"]
        i, f, g, o = np.split(of_x + norm("norm_recurrent", h @ p["recurrent"]["kernel"]), 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(norm("norm_state", c)) @ p["projection"]["kernel"]
        expected.append(h)
    params = jax.tree.map(jnp.float32, p)
    np.testing.assert_allclose(cell.read(params, X, cell.start(B))[0], expected, atol=2e-6)


# ------------------------------------------------------------------------------------------------ peers


def torch_twin(cell: Any, params: Any) -> Any:
    kind = {LSTMCell: torch.nn.LSTM, GRUCell: torch.nn.GRU, ElmanCell: torch.nn.RNN}[type(cell)]
    projected = {"proj_size": cell.width} if isinstance(cell, LSTMCell) and cell.width != W else {}
    module = kind(INPUTS, W, **projected)
    bias = np.zeros_like(params["input"]["bias"])
    if isinstance(cell, GRUCell):
        bias[2 * W :] = params["candidate"]["bias"]
    arrays = [params["input"]["kernel"].T, params["recurrent"]["kernel"].T, params["input"]["bias"], bias]
    arrays += [params["projection"]["kernel"].T] if projected else []
    with torch.no_grad():
        for weight, array in zip(module.parameters(), arrays, strict=True):
            weight.copy_(torch.tensor(np.asarray(array)))
    return module


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("cell", [LSTMCell(W, W), LSTMCell(2, W), GRUCell(W, "after"), ElmanCell(W)])
def test_outputs_and_gradients_are_those_of_pytorch(cell):
    params = random(cell)
    module, x = torch_twin(cell, params), torch.tensor(X, requires_grad=True)
    expected, _ = module(x)
    expected.square().sum().backward()
    y, of_params, of_x = outputs_and_gradients(cell, params)
    np.testing.assert_allclose(y, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(of_x, x.grad, atol=5e-6)  # sums over 7 steps
    for name, weight in zip(("input", "recurrent"), module.parameters(), strict=False):
        np.testing.assert_allclose(of_params[name]["kernel"], weight.grad.T, atol=5e-6)


FLAX = {
    "lstm": (LSTMCell(W, W), nn.LSTMCell(W), ("i", "f", "g", "o")),
    "gru": (GRUCell(W, "after"), nn.GRUCell(W), ("r", "z", "n")),
}


@pytest.mark.parametrize("name", FLAX)
def test_outputs_and_gradients_are_those_of_flax(name):
    cell, theirs, gates = FLAX[name]
    params = random(cell)
    kernels, recurrent, biases = (
        np.split(x, len(gates), -1)
        for x in (params["input"]["kernel"], params["recurrent"]["kernel"], params["input"]["bias"])
    )
    their_params: dict[str, Any] = {}
    for i, gate in enumerate(gates):
        their_params[f"i{gate}"] = {"kernel": kernels[i], "bias": biases[i]}
        their_params[f"h{gate}"] = {"kernel": recurrent[i]}
    if name == "lstm":  # there the bias lies with the recurrent map
        for gate in gates:
            their_params[f"h{gate}"]["bias"] = their_params[f"i{gate}"].pop("bias")
    else:
        their_params["hn"]["bias"] = params["candidate"]["bias"]
    rnn = nn.RNN(theirs, time_major=True)

    def loss(x):
        y = rnn.apply({"params": {"cell": their_params}}, x)
        return jnp.sum(y**2), y

    (_, expected), of_x = jax.value_and_grad(loss, has_aux=True)(X)
    y, _, ours = outputs_and_gradients(cell, params)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(ours, of_x, atol=5e-6)
