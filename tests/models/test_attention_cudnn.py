"""What cuDNN is asked for, given to XLA instead on a CPU; and cuDNN itself where there is a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hybrid_jax.models.attention.choice import on_each_device
from hybrid_jax.models.attention.cudnn import cudnn_attention
from hybrid_jax.models.attention.einsum import plain_attention
from hybrid_jax.models.attention.rule import PLAIN, AttentionRule
from hybrid_jax.parallel.rules import AXES, Placement, under

PLACEMENT = Placement(Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), AXES))
by_xla = partial(cudnn_attention, backend="xla")


def _qkv(length, heads=4, kv_heads=2, batch=2):
    keys = jax.random.split(jax.random.key(length), 3)
    return [
        jax.random.normal(key, (batch, length, n, 8))
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    ]


def _segments(batch, length):
    """Left padding in even rows; two packed sequences and right padding in odd ones."""
    ids = np.zeros((batch, length), np.int32)
    ids[::2, length // 3 :] = 1
    ids[1::2, : length // 2], ids[1::2, length // 2 : length - 2] = 1, 2
    return jnp.asarray(ids)


def _value_and_gradient(attend, qkv, *arguments):
    def loss(qkv):
        out = attend(*qkv, *arguments)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)


@pytest.mark.parametrize(("length", "packed"), [(13, False), (12, True), (13, True)])
@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(scale=0.7, window=4)])
def test_the_arguments_for_cudnn_mean_the_plain_path(length, packed, rule):
    segment_ids = _segments(2, length) if packed else None
    both = [
        _value_and_gradient(attend, _qkv(length), segment_ids, rule) for attend in (by_xla, plain_attention)
    ]
    for fused, plain in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(fused, plain, atol=2e-5)  # sums of 800 products


@pytest.fixture
def lower(monkeypatch):
    """Lowers a training step for a Hopper GPU that is not there; gives what its cuDNN calls are told."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused, "check_compute_capability", lambda at_least: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")

    def lowered(placement, length, *arguments) -> list[dict]:
        qkv = [jnp.zeros((4, length, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
        loss = lambda qkv: jnp.sum(jnp.square(on_each_device(cudnn_attention)(*qkv, *arguments)))  # noqa: E731
        step = jax.jit(under(placement, jax.value_and_grad(loss)))
        program = step.trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
        calls = re.findall(r"custom_call @(__cudnn\S+)\(.*?backend_config = (\"(?:[^\"\\]|\\.)*\")", program)
        told = [
            (name, json.loads(json.loads(config.replace("\\22", '\\"')))["cudnn_fmha_backend_config"])
            for name, config in calls
        ]
        keys = ("mask_type", "sliding_window_length", "fmha_scale")
        return [{"name": name, **{key: config[key] for key in keys}} for name, config in told]

    return lowered


@pytest.mark.parametrize("placement", [None, PLACEMENT])
@pytest.mark.parametrize(
    ("segment_ids", "rule", "name", "window"),
    [
        (None, AttentionRule(scale=0.5, window=40), "__cudnn$fmhaSoftmax", 40),
        (_segments(4, 129), AttentionRule(scale=0.5, window=40), "__cudnn$fmhaScaleBiasSoftmax", 0),
    ],
)
def test_a_training_step_is_lowered_to_cudnn(lower, placement, segment_ids, rule, name, window):
    told = {"mask_type": "CAUSAL", "sliding_window_length": window, "fmha_scale": 0.5}
    expected = [{"name": name, **told}, {"name": f"{name}Backward", **told}]
    assert lower(placement, 129, segment_ids, rule, None) == expected


def test_over_a_mesh_every_device_attends_to_its_own_rows_and_heads():
    arguments = (_qkv(12, batch=4), _segments(4, 12), AttentionRule(window=5), None)
    split = under(PLACEMENT, _value_and_gradient)(lambda *a: on_each_device(by_xla)(*a), *arguments)
    whole = _value_and_gradient(plain_attention, *arguments)
    for fused, plain in zip(*map(jax.tree.leaves, (split, whole)), strict=True):
        np.testing.assert_allclose(fused, plain, atol=2e-5)  # sums of 800 products


ON_A_GPU = """
import jax, jax.numpy as jnp, numpy as np
from hybrid_jax.models.attention.rule import AttentionRule
from hybrid_jax.models.attention.choice import causal_attention
keys = jax.random.split(jax.random.key(0), 3)
qkv = [jax.random.normal(key, (2, 129, n, 64), jnp.bfloat16) for key, n in zip(keys, (4, 2, 2))]
ids = jnp.asarray(np.arange(129) // 50 + np.zeros((2, 1), int), jnp.int32).at[0, :30].set(0)
for segment_ids in (None, ids):
    for rule in (AttentionRule(), AttentionRule(0.1, 40)):
        def loss(qkv, name):
            out = causal_attention(*qkv, segment_ids, rule, implementation=name).astype(jnp.float32)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        assert "__cudnn$fmha" in step.lower(qkv, "cudnn").as_text()
        (_, fused), gradients = step(qkv, "cudnn")
        (_, plain), expected = step(jax.tree.map(lambda x: x.astype(jnp.float32), qkv), "einsum")
        for a, b in zip([fused, *gradients], [plain, *expected]):
            a, b = np.asarray(a, np.float32), np.asarray(b)
            error = np.abs(a - b).max() / np.abs(b).max()
            assert error <= 0.03, (segment_ids is None, rule, error)
print("as the plain path")
"""


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_on_a_gpu_cudnn_is_near_the_plain_path_in_float32():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}  # the tests themselves run on a CPU
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], env=environment, capture_output=True, text=True)
    assert done.stdout == "as the plain path\n", done.stderr
