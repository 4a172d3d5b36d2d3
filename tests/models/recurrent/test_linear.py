"""Cells that are linear in their state: read at once, in pieces and step by step they are one recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.recurrent.cell import Cell, Flow
from hybrid_jax.models.recurrent.lru import LRUCell
from hybrid_jax.models.recurrent.mingru import MinGRUCell
from hybrid_jax.models.recurrent.rg_lru import RGLRUCell

W, B, T = 4, 2, 13
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1, (T, B, W)).astype(np.float32)
SEGMENTS = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3], [1] * 8 + [2] * 5]).T
FLOW = Flow(
    jnp.asarray(SEGMENTS > 0),
    jnp.asarray((SEGMENTS > 0) & (np.pad(SEGMENTS, ((1, 0), (0, 0)))[:-1] != SEGMENTS)),
)
CELLS = {"mingru": MinGRUCell(W), "lru": LRUCell(W, 3), "rg_lru": RGLRUCell(W, 3)}


@pytest.fixture(params=CELLS)
def cell(request):
    return CELLS[request.param]


@pytest.mark.parametrize("flow", [None, FLOW], ids=["one segment", "packed"])
def test_all_at_once_is_the_same_as_step_by_step_with_its_gradient(cell, flow):
    params, start = cell.init(KEY, W), cell.start(B)
    real = 1.0 if flow is None else flow.real[..., None]

    def loss(read, params, x):
        y, state = read(cell, params, x, start, flow)
        return jnp.sum((y * real) ** 2), (y * real, state)

    sides = [
        jax.jit(jax.value_and_grad(lambda p, x, r=read: loss(r, p, x), argnums=(0, 1), has_aux=True))(params, X)
        for read in (type(cell).read, Cell.read)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), *sides)


def test_a_row_read_in_pieces_is_the_row_read_at_once(cell):
    params, pieces, state = cell.init(KEY, W), [], cell.start(B)
    whole, last = cell.read(params, X, state)
    for start, end in ((0, 1), (1, 6), (6, T)):
        y, state = cell.read(params, X[start:end], state)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces), whole, atol=2e-6)
    np.testing.assert_allclose(state, last, atol=2e-6)


def test_a_minimal_gru_follows_its_equations_in_float64():
    params = MinGRUCell(W).init(KEY, W)
    kernel, bias = (np.float64(params["input"][name]) for name in ("kernel", "bias"))
    h, expected = np.zeros((B, W)), []
    for x in X:
        z, n = np.split(x @ kernel + bias, 2, axis=1)
        z = 1 / (1 + np.exp(-z))
        h = (1 - z) * h + z * n
        expected.append(h)
    np.testing.assert_allclose(MinGRUCell(W).read(params, X, np.zeros((B, W)))[0], expected, atol=2e-6)


def test_a_linear_unit_follows_its_equations_in_complex128_and_begins_on_the_ring():
    cell = LRUCell(W, 300, radii=(0.5, 0.8), max_phase=1.0)
    params = jax.tree.map(np.float64, cell.init(KEY, W))
    eigenvalues = np.exp(
        -np.exp(params["eigenvalues"]["log_rate"]) + 1j * np.exp(params["eigenvalues"]["log_phase"])
    )
    assert (np.abs(eigenvalues).min() >= 0.5, np.abs(eigenvalues).max() <= 0.8) == (True, True)
    assert np.mean(np.abs(eigenvalues) ** 2) == pytest.approx((0.25 + 0.64) / 2, abs=0.02)  # uniform by area
    assert (np.angle(eigenvalues).min() >= 0, np.angle(eigenvalues).max() <= 1) == (True, True)
    b, c = params["input"]["kernel"], params["projection"]["kernel"]
    b, c = b[:, :300] + 1j * b[:, 300:], c[:300] - 1j * c[300:]
    h, expected = np.zeros((B, 300), complex), []
    for x in X:
        h = eigenvalues * h + np.sqrt(1 - np.abs(eigenvalues) ** 2) * (x @ b)
        y = (h @ c).real + params["skip"]["scale"] * x
        expected.append(0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))
    y, _ = cell.read(jax.tree.map(jnp.float32, params), X, cell.start(B))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_real_gated_unit_follows_its_equations_in_float64_and_begins_within_its_range():
    """a = σ(Λ)^(8 r) is between 0.9 and 0.999 at the start where the gate r is 1."""
    cell = RGLRUCell(W, 50)
    params = jax.tree.map(np.float64, cell.init(KEY, W))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    base = sigmoid(params["decay"]["logit"])
    assert 0.9 <= (base**8).min() < 0.92 < 0.98 < (base**8).max() <= 0.999
    params["gates"]["bias"] = np.random.default_rng(1).normal(0, 1, 100)
    h, expected = np.zeros((B, 50)), []
    for x in X:
        u, branch = np.split(x @ params["input"]["kernel"], 2, axis=1)
        r, i = np.split(sigmoid(u @ params["gates"]["kernel"] + params["gates"]["bias"]), 2, axis=1)
        a = base ** (8 * r)
        h = a * h + np.sqrt(1 - a**2) * i * u
        gelu = 0.5 * branch * (1 + np.tanh(np.sqrt(2 / np.pi) * (branch + 0.044715 * branch**3)))
        expected.append((gelu * h) @ params["projection"]["kernel"])
    y, _ = cell.read(jax.tree.map(jnp.float32, params), X, cell.start(B))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_real_gated_unit_that_keeps_all_has_a_finite_gradient_and_reads_nothing():
    """With b_r = −100 the gate r is 0 in float32: a = 1, and the root of 1 − a² has an infinite slope."""
    cell = CELLS["rg_lru"]
    params = cell.init(KEY, W)
    params["gates"]["bias"] = params["gates"]["bias"].at[:3].set(-100.0)
    held = jnp.ones((B, 3))
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: jnp.sum(cell.read(p, X, held)[0])))(params)
    assert np.isfinite(loss)
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), gradients)
    np.testing.assert_allclose(cell.read(params, X, held)[1], held, atol=1e-6)


def test_the_gates_of_a_real_gated_unit_are_its_decay_and_its_input_gate():
    """With b_r = 1, b_i = −2 and kernels of 0 they are σ(Λ)^(8 σ(1)) and σ(−2)."""
    cell = CELLS["rg_lru"]
    params = cell.init(KEY, W)
    params["gates"] = {"kernel": jnp.zeros((3, 6)), "bias": jnp.array([1.0] * 3 + [-2.0] * 3)}
    gates = cell.gates(params, cell.start(B), cell.prepared(params, X[0]))
    sigmoid = lambda x: 1 / (1 + np.exp(-np.float64(x)))  # noqa: E731
    decay = sigmoid(params["decay"]["logit"]) ** (8 * sigmoid(1.0))
    assert gates.keys() == {"decay", "input"}
    np.testing.assert_allclose(gates["decay"], [decay] * B, rtol=1e-5)
    np.testing.assert_allclose(gates["input"], np.full((B, 3), sigmoid(-2.0)), rtol=1e-5)
