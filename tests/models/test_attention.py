"""Blocked attention against the plain path and against a numpy loop over single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.attention.blocked import blocked_attention
from hybrid_jax.models.attention.choice import causal_attention
from hybrid_jax.models.attention.einsum import cached_attention, plain_attention
from hybrid_jax.models.attention.rule import AttentionRule, alibi_slopes


def _qkv(batch=2, length=70, heads=4, kv_heads=2, channels=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, n, channels) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _segments(batch, length):
    """Left padding in the first row, three packed sequences and right padding in the others."""
    ids = np.zeros((batch, length), np.int32)
    ids[0, length // 3 :] = 1
    for row in range(1, batch):
        for s, (start, stop) in enumerate(
            [(0, length // 4), (length // 4, length // 2), (length // 2, length - 3)]
        ):
            ids[row, start:stop] = s + 1
    return jnp.asarray(ids)


def _loop(q, k, v, segment_ids, rule=None, sinks=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    rule = rule or AttentionRule()
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
        seen = [s for s in seen if rule.window is None or t - s < rule.window]
        scores = np.array([q[b, t, h] @ k[b, s, h // group] for s in seen])
        scores *= rule.scale or 1 / np.sqrt(q.shape[3])
        if rule.softcap:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        if rule.slopes:
            scores -= rule.slopes[h] * (t - np.array(seen))
        weights = np.exp(scores)
        weights /= weights.sum() + (0.0 if sinks is None else np.exp(np.float64(sinks[h])))
        out[b, t, h] = sum(w * v[b, s, h // group] for w, s in zip(weights, seen, strict=True))
    return out


def test_attention_equals_a_loop_over_single_tokens():
    q, k, v = _qkv(length=13)
    for segment_ids in (_segments(2, 13), jnp.ones((2, 13), jnp.int32)):
        expected = _loop(q, k, v, np.asarray(segment_ids))
        for attention in (blocked_attention, plain_attention):
            np.testing.assert_allclose(jax.jit(attention)(q, k, v, segment_ids), expected, atol=2e-6)


RULES = {
    "scale": (AttentionRule(scale=1.3), None),
    "window": (AttentionRule(window=4), None),
    "softcap": (AttentionRule(scale=1.0, softcap=1.5), None),
    "alibi": (AttentionRule(slopes=(0.5, 0.25, 0.125, 0.0625)), None),
    "sinks": (AttentionRule(), np.array([0.5, -1.0, 2.0, 0.0], np.float32)),
    "all": (AttentionRule(0.7, 5, 2.0, (0.5, 0.25, 0.1, 0.0)), np.array([0.5, -1.0, 2.0, 0.0], np.float32)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_changes_the_weights_as_a_loop_over_single_tokens_does(name):
    rule, sinks = RULES[name]
    q, k, v = _qkv(length=13)
    segment_ids = _segments(2, 13)
    expected = _loop(q, k, v, np.asarray(segment_ids), rule, sinks)
    attend = jax.jit(lambda *qkv: causal_attention(*qkv, segment_ids, rule, sinks))
    np.testing.assert_allclose(attend(q, k, v), expected, atol=2e-6)
    mask = segment_ids == segment_ids[:, -1:]
    distance = jnp.broadcast_to(12 - jnp.arange(13), mask.shape)
    cached = jax.jit(lambda q, k, v: cached_attention(q, k, v, mask, distance, rule, sinks))
    last = cached(q[:, -1], k.swapaxes(1, 2), v.swapaxes(1, 2))
    np.testing.assert_allclose(last, expected[:, -1], atol=2e-6)


def test_a_windowed_block_has_the_gradient_of_the_plain_path():
    qkv, rule = _qkv(length=150), AttentionRule(scale=0.9, window=70)
    segment_ids = _segments(2, 150)
    weights = jax.random.normal(jax.random.key(5), qkv[0].shape)
    both = [
        jax.jit(jax.grad(lambda a, f=f: jnp.sum(f(*a, segment_ids, rule) * weights)))(qkv)
        for f in (blocked_attention, plain_attention)
    ]
    for fast, plain in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(fast, plain, atol=5e-5)


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))  # Press et al. 2022, section 3
    half = [2.0**-0.5 * 2.0**-i for i in range(8)]  # those between, for heads beyond a power of 2
    np.testing.assert_allclose(alibi_slopes(12), [2.0**-i for i in range(1, 9)] + half[:4:1], rtol=1e-12)


@pytest.mark.parametrize(
    ("length", "kv_heads", "packed"),
    [(1, 4, True), (63, 2, False), (64, 1, True), (65, 4, False), (65, 2, True), (150, 4, True)],
)
def test_blocked_attention_equals_the_plain_path(length, kv_heads, packed):
    qkv = _qkv(length=length, kv_heads=kv_heads)
    segment_ids = _segments(2, length) if packed else None
    weights = jax.random.normal(jax.random.key(5), qkv[0].shape)
    both = [
        jax.jit(jax.value_and_grad(lambda a, f=f: jnp.sum(f(*a, segment_ids) * weights)))(qkv)
        for f in (blocked_attention, plain_attention)
    ]
    for fast, plain in zip(*map(jax.tree.leaves, both), strict=True):
        # Sums of 150 float32 products, and the loss: a sum of thousands, in whatever order threads take them.
        np.testing.assert_allclose(fast, plain, atol=2e-5, rtol=5e-6 if np.ndim(plain) == 0 else 1e-7)


def test_long_sequences_use_larger_blocks_and_stay_equal():
    qkv = _qkv(batch=1, length=1100, heads=1, kv_heads=1, channels=4)
    np.testing.assert_allclose(jax.jit(blocked_attention)(*qkv), jax.jit(plain_attention)(*qkv), atol=1e-5)


def test_blocked_attention_in_bfloat16_is_near_the_plain_path():
    qkv, segment_ids = _qkv(dtype=jnp.bfloat16), _segments(2, 70)
    both = [
        jax.jit(jax.grad(lambda a, f=f: jnp.sum(jnp.square(f(*a, segment_ids).astype(jnp.float32)))))(qkv)
        for f in (blocked_attention, plain_attention)
    ]
    for fast, plain in zip(*map(jax.tree.leaves, both), strict=True):
        assert fast.dtype == jnp.bfloat16
        fast, plain = np.asarray(fast, np.float32), np.asarray(plain, np.float32)
        assert np.abs(fast - plain).max() <= 0.04 * np.abs(plain).max()


def test_blocked_attention_can_be_vmapped_inside_a_scan():
    qkv = [jnp.stack([a, a[::-1], -a]) for a in _qkv(length=66)]
    segment_ids = jnp.stack([_segments(2, 66)] * 3)

    def run(attention):
        def one(a, ids):
            gradient = jax.grad(lambda a: jnp.sum(jnp.square(attention(*a, ids))))
            step = lambda a, _: (jax.tree.map(lambda x, g: x - 0.1 * g, a, gradient(a)), None)  # noqa: E731
            return jax.lax.scan(step, a, length=2)[0]

        return jax.jit(jax.vmap(one))(qkv, segment_ids)

    for fast, plain in zip(run(blocked_attention), run(plain_attention), strict=True):
        np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_a_row_of_only_padding_gives_numbers_and_gradients():
    qkv = _qkv()
    empty = jnp.zeros((2, 70), jnp.int32)
    for f in (blocked_attention, plain_attention, causal_attention):
        leaves = jax.tree.leaves(jax.jit(jax.value_and_grad(lambda a, f=f: jnp.sum(f(*a, empty))))(qkv))
        assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_other_segments_and_later_tokens_leave_no_trace():
    q, k, v = _qkv(batch=2, length=70)
    segment_ids = _segments(2, 70)
    other = segment_ids[1] != 2  # everything in the second row but its second segment
    poison = lambda a: a.at[1].set(jnp.where(other[:, None, None], 1e3, a[1]))  # noqa: E731
    kept = np.asarray(segment_ids[1] == 2)
    attention = jax.jit(blocked_attention)
    before, after = attention(q, k, v, segment_ids), attention(q, poison(k), poison(v), segment_ids)
    np.testing.assert_array_equal(np.asarray(after)[1, kept], np.asarray(before)[1, kept])


def test_cached_attention_is_the_last_row_of_causal_attention():
    q, k, v = _qkv(length=9)
    mask = jnp.arange(9)[None] >= jnp.array([[0], [4]])
    whole = jax.jit(plain_attention)(q, k, v, mask.astype(jnp.int32))
    distance = jnp.broadcast_to(8 - jnp.arange(9), mask.shape)
    cached = jax.jit(cached_attention)(q[:, -1], k.swapaxes(1, 2), v.swapaxes(1, 2), mask, distance)
    np.testing.assert_allclose(cached, np.asarray(whole)[:, -1], atol=2e-6)
