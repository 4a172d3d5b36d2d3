"""Causal self-attention within segments, over whole sequences and over a cache.

Scores are ``q·k / √C``; a token sees itself and the earlier tokens of its own segment. So no row is ever
empty, not even one of padding only: padding is segment 0 and sees padding. ``H = K · G`` query heads share
K key/value heads: head ``h`` reads key head ``h // G`` (Ainslie et al. 2023).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.layers import on_cpu

_BLOCK = 64  # query rows at a time: the scores of a block stay in the CPU's cache
_MOST_BLOCKS = 16  # bounds the size of the compiled program for long sequences
_HIDDEN = -1e30  # finite: exp gives exactly 0 and no NaN can arise


def causal_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H C"]:
    """Attention over itself and the earlier tokens of its segment; ``None`` is one segment a row."""
    return blocked_attention(q, k, v, segment_ids) if on_cpu() else plain_attention(q, k, v, segment_ids)


def plain_attention(q, k, v, segment_ids=None):
    """`causal_attention` through `jax.nn.dot_product_attention`."""
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def blocked_attention(q, k, v, segment_ids=None):
    """`causal_attention` for a CPU: blocks of queries, only the keys they see, a hand-written gradient."""
    batch, length, heads, channels = q.shape
    groups = heads // k.shape[2]
    grouped = q.reshape(batch, length, -1, groups, channels).transpose(0, 2, 3, 1, 4)
    out = _attention(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def cached_attention(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    key_mask: Bool[Array, "B S"],
) -> Float[Array, "B H C"]:
    """Attention of one query a row over the cached positions where ``key_mask``."""
    batch, heads, channels = q.shape
    grouped = (q * channels**-0.5).reshape(batch, keys.shape[1], -1, channels)
    scores = jnp.einsum("bkgc,bksc->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(key_mask[:, None, None], scores, _HIDDEN), axis=-1)
    out = jnp.einsum(
        "bkgs,bksc->bkgc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return out.reshape(batch, heads, channels).astype(q.dtype)


# ------------------------------------------------------------------------------------- blocked, for the CPU
# Below, q is [B K G T C], k and v are [B K T C]. Batched products run as [B·K, rows, columns] with the
# contracted axis last on the left and first on the right: XLA's CPU compiler sends other layouts to slow
# loops.


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(_BLOCK, math.ceil(length / _MOST_BLOCKS))
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _product(a: Float[Array, "Z M N"], b: Float[Array, "Z N O"]) -> Float[Array, "Z M O"]:
    return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _visible(start: int, stop: int, segment_ids: Array | None) -> Bool[Array, "..."]:
    """Which keys [0, stop) the queries [start, stop) see; broadcasts to [B K G rows stop]."""
    causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
    if segment_ids is None:
        return causal
    same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
    return (causal & same)[:, None, None]


def _rows(x: Float[Array, "B K G T C"], start: int, stop: int) -> Float[Array, "Z M C"]:
    """The query rows of one block, those of a group one after the other."""
    batch, kv_heads, groups, _, channels = x.shape
    return x[:, :, :, start:stop].reshape(batch * kv_heads, groups * (stop - start), channels)


def _masked(scores: Float[Array, "Z M S"], visible: Array, shape: tuple[int, ...], fill: float) -> Array:
    """``scores`` with ``fill`` where not visible; the mask has the five axes of ``shape`` [B K G rows S]."""
    return jnp.where(visible, scores.reshape(shape), fill).reshape(scores.shape)


@jax.custom_vjp
def _attention(q, k, v, segment_ids):
    return _attention_forward(q, k, v, segment_ids)[0]


def _attention_forward(q, k, v, segment_ids):
    batch, kv_heads, groups, length, channels = q.shape
    keys = k.reshape(-1, length, channels).swapaxes(1, 2)
    values = v.reshape(-1, length, channels)
    scaled = q * channels**-0.5
    outs, log_sums = [], []
    for start, stop in _blocks(length):
        block = (batch, kv_heads, groups, stop - start)
        scores = _product(_rows(scaled, start, stop), keys[:, :, :stop])
        scores = _masked(scores, _visible(start, stop, segment_ids), (*block, stop), _HIDDEN)
        top = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, -1, keepdims=True)
        out = _product(weights.astype(v.dtype), values[:, :stop]) / total
        outs.append(out.reshape(*block, channels))
        log_sums.append((top + jnp.log(total)).reshape(*block, 1))
    out = jnp.concatenate(outs, 3).astype(q.dtype)
    return out, (q, k, v, segment_ids, out, jnp.concatenate(log_sums, 3))


def _attention_backward(saved, dout):
    """Dao et al. 2022, appendix B.2: the weights are recomputed from the saved log-sums, block by block."""
    q, k, v, segment_ids, out, log_sums = saved
    batch, kv_heads, groups, length, channels = q.shape
    scale = channels**-0.5
    scaled = q * scale
    keys, values = k.reshape(-1, length, channels), v.reshape(-1, length, channels)
    delta = jnp.sum(dout.astype(jnp.float32) * out, -1, keepdims=True)
    dq, dkey_blocks, dvalue_blocks = [], [], []  # the latter [Z C stop]: small transposed outputs, not inputs
    for start, stop in reversed(_blocks(length)):
        block = (batch, kv_heads, groups, stop - start)
        queries, upstream = _rows(scaled, start, stop), _rows(dout, start, stop)
        scores = _product(queries, keys[:, :stop].swapaxes(1, 2))
        weights = jnp.exp(scores - _rows(log_sums, start, stop))
        weights = _masked(weights, _visible(start, stop, segment_ids), (*block, stop), 0.0)
        dweights = _product(upstream, values[:, :stop].swapaxes(1, 2))
        dscores = (weights * (dweights - _rows(delta, start, stop))).astype(q.dtype)
        dq.append((_product(dscores, keys[:, :stop]) * scale).reshape(*block, channels))
        dvalue_blocks.append(_product(upstream.swapaxes(1, 2), weights.astype(q.dtype)))
        dkey_blocks.append(_product(queries.swapaxes(1, 2), dscores))
    dkeys, dvalues = _sum_prefixes(dkey_blocks), _sum_prefixes(dvalue_blocks)
    dk = dkeys.swapaxes(1, 2).reshape(k.shape).astype(k.dtype)
    dv = dvalues.swapaxes(1, 2).reshape(v.shape).astype(v.dtype)
    return jnp.concatenate(dq[::-1], 3).astype(q.dtype), dk, dv, None


def _sum_prefixes(blocks: list[Float[Array, "Z C S"]]) -> Float[Array, "Z C T"]:
    """Sums arrays over growing prefixes of the keys; the first one, of the last queries, spans them all."""
    total = blocks[0]
    for block in blocks[1:]:
        total = total.at[:, :, : block.shape[2]].add(block)
    return total


_attention.defvjp(_attention_forward, _attention_backward)
