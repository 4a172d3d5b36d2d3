"""Log-probs of hidden states, read in stretches of tokens, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms import log_probs
from hybrid_jax.parallel.mesh import MeshConfig, put_rows
from hybrid_jax.parallel.rules import shard, under

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 11, 16, 24


@pytest.fixture
def inputs():
    random = np.random.default_rng(0)
    states = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    return random.normal(size=(WIDTH, VOCABULARY)).astype(np.float32), states, targets


def weighted(kernel, states, targets):
    """A sum in which every token has another weight, and entropies others again."""
    weights = jnp.cos(jnp.arange(targets.size)).reshape(targets.shape)

    def logits_of(states):  # as a model's: it says where its logits lie, and knows how many rows there are
        flat = states.reshape(-1, states.shape[2]) @ kernel
        return shard(flat.reshape(*states.shape[:2], -1), "batch", "length", "vocab")

    chosen, entropies = log_probs.state_log_probs(logits_of, states, targets, VOCABULARY, with_entropy=True)
    return jnp.sum(weights * chosen + weights**2 * entropies)


def oracle(kernel, states, targets):
    log_softmax = jax.nn.log_softmax(states @ kernel)
    weights = jnp.cos(jnp.arange(targets.size)).reshape(targets.shape)
    chosen = jnp.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * chosen - weights**2 * jnp.sum(jnp.exp(log_softmax) * log_softmax, -1))


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_stretches_give_the_values_and_gradients_of_the_whole(inputs, mesh, monkeypatch):
    monkeypatch.setattr(log_probs, "MOST_LOGIT_BYTES", 4 * VOCABULARY * 2 * 4)
    placement = MeshConfig(**mesh).placement()
    kernel, *rows = inputs
    value, grads = jax.value_and_grad(oracle, (0, 1))(kernel, *rows)
    step = jax.jit(under(placement, jax.value_and_grad(weighted, (0, 1))))
    arguments = (jnp.asarray(kernel), *put_rows(placement, tuple(rows)))
    got, got_grads = step(*arguments)
    assert float(got) == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, got_grads)
    text = step.lower(*arguments).compile().as_text()
    assert "while" in text  # they were stretches
    assert f"f32[{ROWS},{LENGTH},{VOCABULARY}]" not in text


def test_a_stretch_holds_no_more_logits_than_a_device_may():
    assert log_probs._stretch(16, 256, 8192) is None  # 134 MB in all
    assert log_probs._stretch(8, 1024, 128_256) == 2**28 // (2 * 4 * 8 * 128_256) == 32
    assert under(MeshConfig(fsdp=8).placement(), log_probs._stretch)(8, 1024, 128_256) == 261
