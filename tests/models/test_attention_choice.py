"""Which implementation of attention serves which call, and what is said about it."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from hybrid_jax.core.registry import UserError
from hybrid_jax.models import attention
from hybrid_jax.models.attention import AttentionCall, AttentionRule, causal_attention, choose
from hybrid_jax.parallel.rules import AXES, Placement, under

CPU = AttentionCall("cpu", "float32", length=512, channels=64)
TPU = replace(CPU, platform="tpu", dtype="bfloat16")
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
    ],
)
def test_a_call_is_served_by_the_fastest_that_can(call, expected):
    assert choose(call) == expected


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


@pytest.mark.parametrize(("kv_heads", "alike"), [(4, True), (2, False), (1, False)])
def test_heads_are_split_alike_where_the_mesh_divides_both(kv_heads, alike, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "choose", lambda call, asked: calls.append(call) or ("einsum", None))
    placement = Placement(Mesh(np.asarray(jax.devices()).reshape(1, 2, 4), AXES))
    q, k = jnp.zeros((2, 9, 8, 4)), jnp.zeros((2, 9, kv_heads, 4))
    jax.eval_shape(under(placement, causal_attention), q, k, k)
    assert calls == [AttentionCall("cpu", "float32", length=9, channels=4, heads_split_alike=alike)]


def test_a_choice_is_logged_once(caplog):
    attention._log_once.cache_clear()
    with caplog.at_level(logging.DEBUG, attention.__name__):
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
