"""The layers of NTM and DNC against plain loops in float64, and as language models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.memory.dnc import DNCCell
from hybrid_jax.models.memory.ntm import NTMCell
from hybrid_jax.models.recurrent.cell import Flow
from hybrid_jax.models.recurrent.gru import GRUCell

N, D, M, W, R, B, T = 3, 5, 6, 4, 2, 2, 9  # N inputs
X = np.random.default_rng(0).normal(0, 1, (T, B, N)).astype(np.float32)
GOES_ON = Flow(jnp.ones((T, B), bool), jnp.zeros((T, B), bool))
CELLS = {"ntm": NTMCell(GRUCell(D), M, W, R, 2, 1), "dnc": DNCCell(GRUCell(D), M, W, R)}


@functools.cache
def compiled(name):
    """Parameters of a cell, and a function of them, inputs and flow: (Σ r², (y, state)) and its gradient.

    Only what is read counts in the sum, so that a head or a link that does nothing has no gradient.
    """
    cell, generator = CELLS[name], np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), N))
    params = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0, 0.8, leaf.shape), jnp.float32), shapes)

    def loss(params, x, flow):
        y, state = cell.read(params, x, cell.start(B), flow)
        return jnp.sum(jnp.square(y[..., D:])), (y, state)

    return params, jax.jit(jax.value_and_grad(loss, has_aux=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def by_content(memory, key, strength):
    likeness = [key @ slot / np.sqrt((key @ key + 1e-6) * (slot @ slot + 1e-6)) for slot in memory]
    return softmax(strength * np.array(likeness))


class Controller:
    """A GRU of one row in float64."""

    def __init__(self, p):
        self.p, self.h = p, np.zeros(D)

    def __call__(self, x):
        r, z, n = np.split(x @ self.p["input"]["kernel"] + self.p["input"]["bias"], 3)
        u = np.split(self.p["recurrent"]["kernel"], 3, axis=1)
        r, z = sigmoid(r + self.h @ u[0]), sigmoid(z + self.h @ u[1])
        self.h = (1 - z) * self.h + z * np.tanh(n + (r * self.h) @ u[2])
        return self.h


def loop(cell, params, x, access):
    """What a layer gives for one row; ``access(said, state) -> reads`` is the memory."""
    p = jax.tree.map(np.float64, params)
    controller, reads, given = Controller(p["controller"]), np.zeros((R, W)), []
    for now in x:
        h = controller(np.concatenate([now, reads.ravel()]))
        flat, said = np.clip(h @ p["interface"]["kernel"] + p["interface"]["bias"], -20, 20), {}
        for name, shape in cell.interface.items():
            size = int(np.prod(shape))
            said[name], flat = flat[:size].reshape(shape), flat[size:]
        reads = access(said)
        given.append(np.concatenate([h, reads.ravel()]))
    return np.array(given)


class PlainNTM:
    def __init__(self, cell):
        self.writes, heads = cell.num_writes, cell.num_writes + R
        self.memory, self.w = np.full((M, W), 1e-6), [np.eye(M)[0] for _ in range(heads)]

    def move(self, said, h):
        c = by_content(self.memory, np.tanh(said["key"][h]), np.log1p(np.exp(said["strength"][h])))
        g = sigmoid(said["gate"][h])
        gated = g * c + (1 - g) * self.w[h]
        shares = dict(zip((-1, 0, 1), softmax(said["shift"][h]), strict=True))
        moved = [
            sum(gated[j] * shares[s] for j in range(M) for s in shares if (j + s) % M == i) for i in range(M)
        ]
        powers = np.array(moved) ** (1 + np.log1p(np.exp(said["power"][h])))
        self.w[h] = powers / powers.sum()

    def __call__(self, said):
        for h in range(self.writes):
            self.move(said, h)
        for h in range(self.writes):
            self.memory = self.memory * (1 - np.outer(self.w[h], sigmoid(said["erase"][h])))
        for h in range(self.writes):
            self.memory = self.memory + np.outer(self.w[h], np.tanh(said["add"][h]))
        for h in range(self.writes, self.writes + R):
            self.move(said, h)
        return np.array([w @ self.memory for w in self.w[self.writes :]])


class PlainDNC:
    def __init__(self, cell):
        self.memory, self.link = np.full((M, W), 1e-6), np.zeros((M, M))
        self.usage, self.written, self.precedence = np.zeros(M), np.zeros(M), np.zeros(M)
        self.reads = np.zeros((R, M))

    def __call__(self, said):
        oneplus = lambda x: 1 + np.log1p(np.exp(x))  # noqa: E731
        for i in range(M):
            u, w = self.usage[i], self.written[i]
            kept = np.prod([1 - sigmoid(said["free"][r]) * self.reads[r, i] for r in range(R)])
            self.usage[i] = (u + w - u * w) * kept
        free, product = np.zeros(M), 1.0
        for slot in np.argsort(self.usage, kind="stable"):
            free[slot] = (1 - self.usage[slot]) * product
            product *= self.usage[slot]
        c = by_content(self.memory, said["write_key"][0], oneplus(said["write_strength"][0]))
        g = sigmoid(said["allocate"])
        w = sigmoid(said["write"]) * (g * free + (1 - g) * c)
        self.memory = self.memory * (1 - np.outer(w, sigmoid(said["erase"][0]))) + np.outer(w, said["add"][0])
        for i in range(M):
            for j in range(M):
                self.link[i, j] = (
                    (1 - w[i] - w[j]) * self.link[i, j] + w[i] * self.precedence[j] if i != j else 0
                )
        self.precedence, self.written = (1 - w.sum()) * self.precedence + w, w
        for r in range(R):
            c, (back, content, on) = (
                by_content(self.memory, said["key"][r], oneplus(said["strength"][r])),
                softmax(said["modes"][r]),
            )
            before = self.reads[r]
            self.reads[r] = back * (self.link.T @ before) + content * c + on * (self.link @ before)
        return self.reads @ self.memory


@pytest.mark.parametrize(("name", "plain"), [("ntm", PlainNTM), ("dnc", PlainDNC)])
def test_a_layer_follows_its_equations_in_float64(name, plain):
    cell, (params, run) = CELLS[name], compiled(name)
    (_, (given, (_, memory))), _ = run(params, X, GOES_ON)
    for row in range(B):
        oracle = plain(cell)
        np.testing.assert_allclose(given[:, row], loop(cell, params, X[:, row], oracle), atol=2e-5)
        np.testing.assert_allclose(memory.slots[row], oracle.memory, atol=2e-5)


@pytest.mark.parametrize("name", CELLS)
def test_every_parameter_has_a_gradient_through_the_memory(name):
    params, run = compiled(name)
    _, grads = run(params, X, GOES_ON)
    at = 0
    for part, shape in CELLS[name].interface.items():
        size = int(np.prod(shape))
        assert np.abs(grads["interface"]["bias"][at : at + size]).min() > 1e-6, part
        at += size
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])).all()


@pytest.mark.parametrize("name", CELLS)
def test_a_packed_sequence_is_as_alone_to_the_bit_and_padding_leaves_the_memory_empty(name):
    params, run = compiled(name)
    at = jnp.arange(T)[:, None] * jnp.ones((1, B), int)
    (_, (packed, _)), _ = run(params, X, Flow(at >= 1, (at == 1) | (at == 5)))
    (_, (alone, _)), _ = run(params, X, Flow(at >= 5, at == 5))
    np.testing.assert_array_equal(packed[5:], alone[5:])
    assert np.abs(packed[5:] - run(params, X, Flow(at >= 1, at == 1))[0][1][0][5:]).max() > 1e-2
    (_, (_, state)), _ = run(params, X, Flow(at > T, at > T))
    jax.tree.map(np.testing.assert_array_equal, state, CELLS[name].start(B))
