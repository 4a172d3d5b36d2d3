"""Which implementation of attention serves which call, and what is said about it."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.attention import choice
from hybrid_jax.models.attention.choice import IMPLEMENTATIONS, causal_attention, choose
from hybrid_jax.models.attention.rule import AttentionCall, AttentionRule
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.parallel.rules import AXES, Placement, under
from hybrid_jax.phases.sft import sft_losses

CPU = AttentionCall("cpu", "float32", length=512, channels=64)
TPU = replace(CPU, platform="tpu", dtype="bfloat16")
H100 = replace(TPU, platform="gpu", capability=(9, 0))
SOFTCAP, ALIBI, WINDOW = AttentionRule(softcap=30.0), AttentionRule(slopes=(0.5, 0.25)), AttentionRule(window=9)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (CPU, ("blocked", None)),
        (replace(CPU, segments=True, rule=WINDOW), ("blocked", None)),
        (replace(CPU, rule=SOFTCAP), ("einsum", "blocked has no soft-cap")),
        (replace(CPU, rule=ALIBI), ("einsum", "blocked has no ALiBi")),
        (replace(CPU, sinks=True), ("einsum", "blocked has no sinks")),
        (replace(CPU, platform="METAL"), ("einsum", None)),
        (replace(TPU, segments=True, sinks=True, rule=AttentionRule(0.1, 9, 30.0)), ("splash", None)),
        (replace(TPU, rule=ALIBI), ("einsum", "splash has no ALiBi")),
        (replace(TPU, dtype="float16"), ("einsum", "splash computes in bfloat16 or float32, not in float16")),
        (replace(TPU, length=127), ("einsum", "splash works on blocks of 128 tokens, here are 127")),
        (
            replace(TPU, heads_split_alike=False),
            ("einsum", "splash needs the K/V heads split over the mesh as the query heads are"),
        ),
        (H100, ("cudnn", None)),
        (replace(H100, rule=WINDOW, dtype="float16", channels=256), ("cudnn", None)),
        (
            replace(H100, segments=True),
            ("einsum", "cudnn would read segments as a mask, which has not been measured on a GPU"),
        ),
        (
            replace(H100, capability=(8, 0)),
            ("einsum", "cudnn is known to be faster on compute capability 9.0 only"),
        ),
    ],
)
def test_a_call_is_served_by_the_fastest_that_can(call, expected):
    assert choose(call) == expected


@pytest.mark.parametrize(
    ("platform", "masked", "chosen"),
    [("gpu", True, "einsum"), ("gpu", False, "cudnn"), ("tpu", True, "splash"), ("cpu", True, "blocked")],
)
def test_what_training_computes_with_is_what_the_docs_say(platform, masked, chosen, monkeypatch):
    """docs/scale.md: training gives segments with every row, packed or padded, so a GPU takes einsum."""
    made = []

    def taken(call, asked):
        made.append(choose(call, asked)[0])
        return "einsum", None

    monkeypatch.setattr(choice, "choose", taken)
    monkeypatch.setattr(choice, "target_platform", lambda: platform)
    monkeypatch.setattr(choice, "_capability", lambda: (9, 0))
    model = DecoderConfig(num_layers=1, width=64, num_heads=1, max_length=256, dtype="bfloat16").build(8)
    params, tokens = jax.eval_shape(model.init, jax.random.key(0)), jnp.ones((2, 128), jnp.int32)
    if masked:
        batch: Any = TokenBatch
        batch = batch(tokens=tokens, segment_ids=tokens, loss_mask=tokens > 0)
        jax.eval_shape(lambda params: sft_losses(model, params, batch), params)
    else:
        jax.eval_shape(lambda params: model.apply(params, tokens), params)
    assert made == [chosen]


def test_an_implementation_that_is_asked_for_serves_or_says_why_it_cannot():
    assert choose(CPU, "einsum") == ("einsum", None)
    assert choose(replace(CPU, platform="tpu"), "blocked") == ("blocked", None)
    with pytest.raises(
        UserError, match=r"^attention 'blocked' cannot serve this model here: blocked has no ALi"
    ):
        choose(replace(CPU, rule=ALIBI), "blocked")
    with pytest.raises(
        UserError, match=r"^unknown attention implementation 'blockd'; did you mean 'blocked'\?"
    ):
        choose(CPU, "blockd")


def _call(dtype=jnp.float32, **options):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 2, 8), dtype)
    return causal_attention(q, k, v, **options)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (CPU, "cudnn needs an NVIDIA GPU of compute capability 8.0 or more"),
        (replace(H100, capability=None), "cudnn needs an NVIDIA GPU of compute capability 8.0 or more"),
        (replace(H100, capability=(7, 5)), "cudnn needs an NVIDIA GPU of compute capability 8.0 or more"),
        (replace(H100, dtype="float32"), "cudnn computes in bfloat16 or float16, not in float32"),
        (replace(H100, rule=SOFTCAP), "cudnn has no soft-cap"),
        (replace(H100, rule=ALIBI), "cudnn has no ALiBi"),
        (replace(H100, sinks=True), "cudnn has no sinks"),
        (replace(H100, channels=100), "cudnn's heads have a multiple of 8 channels up to 256, these have 100"),
        (replace(H100, channels=264), "cudnn's heads have a multiple of 8 channels up to 256, these have 264"),
        (
            replace(H100, channels=256, capability=(8, 9)),
            "cudnn's heads have a multiple of 8 channels up to 128, these have 256",
        ),
        (
            replace(H100, heads_split_alike=False),
            "cudnn needs the K/V heads split over the mesh as the query heads are",
        ),
        (replace(H100, segments=True, rule=WINDOW), None),
        (replace(H100, capability=(8, 0), channels=128), None),
        (replace(H100, capability=(12, 0), channels=256), None),
    ],
)
def test_cudnn_serves_what_it_documents_and_is_exact(call, why):
    assert IMPLEMENTATIONS["cudnn"].reason(call) == why


@pytest.mark.parametrize(
    ("said", "capability"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)]
)
@pytest.mark.parametrize("placed", [False, True])
def test_the_compute_capability_is_that_of_the_devices_to_compile_for(said, capability, placed, monkeypatch):
    device = SimpleNamespace(**({"compute_capability": said} if said else {}))
    other = SimpleNamespace(compute_capability="7.0")
    placement = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([[device]])))
    monkeypatch.setattr(jax, "devices", lambda: [other if placed else device])
    monkeypatch.setattr(choice, "current_placement", lambda: placement if placed else None)
    assert choice._capability() == capability


@pytest.mark.parametrize(("kv_heads", "alike"), [(4, True), (2, False), (1, False)])
def test_heads_are_split_alike_where_the_mesh_divides_both(kv_heads, alike, monkeypatch):
    calls = []
    monkeypatch.setattr(choice, "choose", lambda call, asked: calls.append(call) or ("einsum", None))
    placement = Placement(Mesh(np.asarray(jax.devices()).reshape(1, 2, 4), AXES))
    q, k = jnp.zeros((2, 9, 8, 4)), jnp.zeros((2, 9, kv_heads, 4))
    jax.eval_shape(under(placement, causal_attention), q, k, k)
    assert calls == [AttentionCall("cpu", "float32", length=9, channels=4, heads_split_alike=alike)]


def test_a_choice_is_logged_once(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.DEBUG, choice.__name__):
        for options in ({}, {}, {"rule": SOFTCAP}, {"rule": SOFTCAP}, {"implementation": "einsum"}):
            _call(**options)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "attention: blocked"),
        ("DEBUG", "attention: einsum, since blocked has no soft-cap"),
        ("INFO", "attention: einsum"),
    ]


def test_the_implementation_asked_for_is_the_one_that_computes():
    blocked, plain = _call(), _call(implementation="einsum")
    assert not np.array_equal(blocked, plain)  # other orders of summation
    np.testing.assert_allclose(blocked, plain, atol=1e-6)
    np.testing.assert_array_equal(blocked, _call(implementation="blocked"))
