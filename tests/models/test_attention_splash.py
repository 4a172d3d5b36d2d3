"""The TPU's kernel against the plain path: interpreted on the CPU, and compiled for a TPU that is not there."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.models.attention import choice
from hybrid_jax.models.attention.choice import causal_attention, on_each_device
from hybrid_jax.models.attention.einsum import plain_attention
from hybrid_jax.models.attention.rule import PLAIN, AttentionRule
from hybrid_jax.models.attention.splash import splash_attention
from hybrid_jax.parallel.rules import AXES, ROLLOUTS, TRAINING, Placement, under

interpreted = partial(splash_attention, interpret=True)


def _inputs(batch, length, heads, kv_heads, channels, sinks=False, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, length, n, channels) for n in (heads, kv_heads, kv_heads)]
    qkv = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False)]
    return (*qkv, jax.random.normal(keys[3], (heads,)) if sinks else None)


def _segments(batch, length):
    """Left padding in even rows; two packed sequences and right padding in odd ones."""
    ids = np.zeros((batch, length), np.int32)
    ids[::2, length // 3 :] = 1
    ids[1::2, : length // 2], ids[1::2, length // 2 : length - 2] = 1, 2
    return jnp.asarray(ids)


def _value_and_gradient(attend, inputs, segment_ids, rule):
    def loss(inputs):
        q, k, v, sinks = inputs
        out = attend(q, k, v, segment_ids, rule, sinks).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)


CASES = {  # length, H, K, segments, rule, sinks
    "packed rows, padded to a block": (131, 4, 2, True, PLAIN, False),
    "a window over many blocks": (640, 1, 1, False, AttentionRule(window=100), False),
    "everything": (250, 2, 1, True, AttentionRule(0.6, 70, 1.5), True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_has_the_values_and_gradients_of_the_plain_path(case):
    length, heads, kv_heads, packed, rule, sinks = CASES[case]
    inputs = _inputs(2, length, heads, kv_heads, 8, sinks)
    segment_ids = _segments(2, length) if packed else None
    both = [_value_and_gradient(attend, inputs, segment_ids, rule) for attend in (interpreted, plain_attention)]
    for fast, plain in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(fast, plain, atol=3e-5)  # sums of up to 640 float32 products


def test_the_kernel_in_bfloat16_is_near_the_plain_path_in_float32():
    inputs = _inputs(2, 128, 1, 1, 8, dtype=jnp.bfloat16)
    (_, fast), gradients = _value_and_gradient(interpreted, inputs, _segments(2, 128), PLAIN)
    inputs = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    (_, exact), exact_gradients = _value_and_gradient(plain_attention, inputs, _segments(2, 128), PLAIN)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {"bfloat16"}
    for a, b in zip(
        [fast, *jax.tree.leaves(gradients)], [exact, *jax.tree.leaves(exact_gradients)], strict=True
    ):
        assert np.abs(np.float32(a) - b).max() <= 0.02 * np.abs(b).max()


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        (TRAINING, PartitionSpec(("data", "fsdp"), None, "tensor")),
        (ROLLOUTS["replicated"], PartitionSpec(("data", "fsdp"))),  # too few rows for "tensor": twice the same
    ],
)
def test_over_a_mesh_every_device_attends_to_its_own_rows_and_heads(rules, spec):
    placement = Placement(Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), AXES), rules)
    inputs, segment_ids = _inputs(4, 40, 2, 2, 8, sinks=True), _segments(4, 40)
    rule = AttentionRule(window=9)

    def sharded(*arguments):
        return on_each_device(interpreted)(*arguments)

    split = under(placement, _value_and_gradient)(sharded, inputs, segment_ids, rule)
    out = split[0][1]
    assert out.sharding.is_equivalent_to(NamedSharding(placement.mesh, spec), out.ndim)
    whole = _value_and_gradient(plain_attention, inputs, segment_ids, rule)
    for fast, plain in zip(*map(jax.tree.leaves, (split, whole)), strict=True):
        np.testing.assert_allclose(fast, plain, atol=3e-5)


@pytest.fixture
def tpu(monkeypatch):
    """The four devices of a TPU that is not there, to compile for."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # test processes side by side
    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # needs the devices
@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(0.1, 200, 50.0)])
def test_a_training_step_compiles_for_a_tpu_and_holds_the_kernel(tpu, rule, caplog):
    choice._log_once.cache_clear()
    placement = Placement(Mesh(np.asarray(tpu).reshape(1, 2, 2), AXES))
    whole = NamedSharding(placement.mesh, PartitionSpec())
    inputs = (_inputs(4, 300, 4, 2, 64, sinks=True, dtype=jnp.bfloat16), _segments(4, 300))

    def loss(inputs, ids):
        return jnp.sum(causal_attention(*inputs[:3], ids, rule, inputs[3]).astype(jnp.float32) ** 2)

    with caplog.at_level(logging.INFO, choice.__name__):
        step = jax.jit(under(placement, jax.value_and_grad(loss)))
        lowered = step.lower(
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), inputs)
        )
    assert caplog.messages == ["attention: splash"]
    program = lowered.compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 3  # forward, dq, dk and dv
    assert "f32[2,2,384,384]" not in program  # no array of all scores
