"""Attention for a CPU: blocks of queries, only the keys they see, a hand-written gradient.

Below, q is [B K G T C], k and v are [B K T C]. Batched products run as [B·K, rows, columns] with the
contracted axis last on the left and first on the right: XLA's CPU compiler sends other layouts to slow
loops.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from hybrid_jax.models.attention.einsum import HIDDEN
from hybrid_jax.models.attention.rule import PLAIN, AttentionCall

_BLOCK = 64  # query rows at a time: the scores of a block stay in the CPU's cache
_MOST_BLOCKS = 16  # bounds the size of the compiled program for long sequences


def reason(call: AttentionCall) -> str | None:
    """The reason why this implementation cannot serve the call."""
    if call.rule.softcap is not None:
        return "blocked has no soft-cap"
    if call.rule.slopes is not None:
        return "blocked has no ALiBi"
    return "blocked has no sinks" if call.sinks else None


def blocked_attention(q, k, v, segment_ids=None, rule=PLAIN):
    """`causal_attention` for a CPU: blocks of queries, only the keys they see, a hand-written gradient."""
    batch, length, heads, channels = q.shape
    groups = heads // k.shape[2]
    grouped = q.reshape(batch, length, -1, groups, channels).transpose(0, 2, 3, 1, 4)
    scale = rule.score_scale(channels)
    out: Array = _attention(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids, scale, rule.window)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(_BLOCK, math.ceil(length / _MOST_BLOCKS))
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _product(a: Float[Array, "Z M N"], b: Float[Array, "Z N O"]) -> Float[Array, "Z M O"]:
    return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _visible(start: int, stop: int, segment_ids: Array | None, window: int | None) -> Bool[Array, "..."]:
    """Which keys [0, stop) the queries [start, stop) see; broadcasts to [B K G rows stop]."""
    distance = jnp.arange(start, stop)[:, None] - jnp.arange(stop)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if segment_ids is None:
        return seen
    same = segment_ids[:, start:stop, None] == segment_ids[:, None, :stop]
    return (seen & same)[:, None, None]


def _rows(x: Float[Array, "B K G T C"], start: int, stop: int) -> Float[Array, "Z M C"]:
    """The query rows of one block, those of a group one after the other."""
    batch, kv_heads, groups, _, channels = x.shape
    return x[:, :, :, start:stop].reshape(batch * kv_heads, groups * (stop - start), channels)


def _masked(scores: Float[Array, "Z M S"], visible: Array, shape: tuple[int, ...], fill: float) -> Array:
    """``scores`` with ``fill`` where not visible; the mask has the five axes of ``shape`` [B K G rows S]."""
    return jnp.where(visible, scores.reshape(shape), fill).reshape(scores.shape)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segment_ids, scale, window):
    return _attention_forward(q, k, v, segment_ids, scale, window)[0]


def _attention_forward(q, k, v, segment_ids, scale, window):
    batch, kv_heads, groups, length, channels = q.shape
    keys = k.reshape(-1, length, channels).swapaxes(1, 2)
    values = v.reshape(-1, length, channels)
    scaled = q * scale
    outs, log_sums = [], []
    for start, stop in _blocks(length):
        block = (batch, kv_heads, groups, stop - start)
        scores = _product(_rows(scaled, start, stop), keys[:, :, :stop])
        scores = _masked(scores, _visible(start, stop, segment_ids, window), (*block, stop), HIDDEN)
        top = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, -1, keepdims=True)
        out = _product(weights.astype(v.dtype), values[:, :stop]) / total
        outs.append(out.reshape(*block, channels))
        log_sums.append((top + jnp.log(total)).reshape(*block, 1))
    out = jnp.concatenate(outs, 3).astype(q.dtype)
    return out, (q, k, v, segment_ids, out, jnp.concatenate(log_sums, 3))


def _attention_backward(scale, window, saved, dout):
    """Dao et al. 2022, appendix B.2: the weights are recomputed from the saved log-sums, block by block."""
    q, k, v, segment_ids, out, log_sums = saved
    batch, kv_heads, groups, length, channels = q.shape
    scaled = q * scale
    keys, values = k.reshape(-1, length, channels), v.reshape(-1, length, channels)
    delta = jnp.sum(dout.astype(jnp.float32) * out, -1, keepdims=True)
    dq, dkey_blocks, dvalue_blocks = [], [], []  # the latter [Z C stop]: small transposed outputs, not inputs
    for start, stop in reversed(_blocks(length)):
        block = (batch, kv_heads, groups, stop - start)
        queries, upstream = _rows(scaled, start, stop), _rows(dout, start, stop)
        scores = _product(queries, keys[:, :stop].swapaxes(1, 2))
        weights = jnp.exp(scores - _rows(log_sums, start, stop))
        weights = _masked(weights, _visible(start, stop, segment_ids, window), (*block, stop), 0.0)
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
