"""Causal self-attention within segments, over whole sequences and over a cache.

Scores are ``scale · q·k``; a token sees itself and the earlier tokens of its own segment. So no row is ever
empty, not even one of padding only: padding is segment 0 and sees padding. ``H = K · G`` query heads share
K key/value heads: head ``h`` reads key head ``h // G`` (Ainslie et al. 2023). An `AttentionRule` says what
else a model's family does to the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.layers import on_cpu

_BLOCK = 64  # query rows at a time: the scores of a block stay in the CPU's cache
_MOST_BLOCKS = 16  # bounds the size of the compiled program for long sequences
_HIDDEN = -1e30  # finite: exp gives exactly 0 and no NaN can arise


@dataclass(frozen=True)
class AttentionRule:
    """How scores become weights, beside causality: ``softmax(mask(cap · tanh(scale · q·k / cap) + bias))``.

    Attributes:
        scale: of the scores; None is 1/√C.
        window: a token sees itself and the ``window - 1`` tokens before it.
        softcap: bound of the scores, smoothly (Gemma 2).
        slopes: of ALiBi, one a head: ``-slope · distance`` is added (Press et al. 2022).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None

    def score_scale(self, channels: int) -> float:
        return channels**-0.5 if self.scale is None else self.scale


PLAIN = AttentionRule()


def alibi_slopes(heads: int, largest_exponent: float = 8.0) -> tuple[float, ...]:
    """``2^(-e h / n)`` for h = 1 … n, n the power of 2 at least ``heads``, e the largest exponent.

    Where ``heads`` is less than n: every second slope first, then those between (Press et al. 2022).
    """
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-largest_exponent * h / n) for h in range(1, n + 1)]
    return tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads])


def causal_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    rule: AttentionRule = PLAIN,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H C"]:
    """Attention over itself and the earlier tokens of its segment; ``None`` is one segment a row.

    ``sinks`` are scores that take part in the softmax and have no value (gpt-oss).
    """
    blocks = on_cpu() and rule.softcap is None and rule.slopes is None and sinks is None
    attend = blocked_attention if blocks else partial(plain_attention, sinks=sinks)
    return attend(q, k, v, segment_ids, rule)


def plain_attention(q, k, v, segment_ids=None, rule=PLAIN, sinks=None):
    """`causal_attention` as it is written down."""
    batch, length, _, channels = q.shape
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    grouped = q.reshape(batch, length, k.shape[2], -1, channels)
    scores = jnp.einsum("btkgc,bskc->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = _weights(scores, visible[:, None, None], distance, rule, channels, sinks)
    out = jnp.einsum("bkgts,bskc->btkgc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def cached_attention(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    key_mask: Bool[Array, "B S"],
    slot: Int[Array, ""] | int = 0,
    rule: AttentionRule = PLAIN,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B H C"]:
    """Attention of one query a row, in ``slot``, over the cached positions where ``key_mask``."""
    batch, heads, channels = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, channels)
    scores = jnp.einsum("bkgc,bksc->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    distance = (slot - jnp.arange(keys.shape[2]))[None]
    weights = _weights(scores[..., None, :], key_mask[:, None, None, None], distance, rule, channels, sinks)[
        ..., 0, :
    ]
    out = jnp.einsum(
        "bkgs,bksc->bkgc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return out.reshape(batch, heads, channels).astype(q.dtype)


def _weights(
    scores: Float[Array, "B K G T S"],
    visible: Bool[Array, "B #K #G #T S"],
    distance: Int[Array, "T S"],
    rule: AttentionRule,
    channels: int,
    sinks: Float[Array, "H"] | None,
) -> Float[Array, "B K G T S"]:
    """Softmax over the visible positions (and the sink) of the scores as the rule changes them."""
    scores = scores * rule.score_scale(channels)
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    if rule.slopes is not None:
        slopes = jnp.asarray(rule.slopes).reshape(scores.shape[1:3])
        scores = scores - slopes[..., None, None] * distance
    if rule.window is not None:
        visible = visible & (distance < rule.window)
    scores = jnp.where(visible, scores, _HIDDEN)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = jnp.broadcast_to(sinks.reshape(*scores.shape[1:3], 1, 1), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]


# ------------------------------------------------------------------------------------- blocked, for the CPU
# Below, q is [B K G T C], k and v are [B K T C]. Batched products run as [B·K, rows, columns] with the
# contracted axis last on the left and first on the right: XLA's CPU compiler sends other layouts to slow
# loops.


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
        scores = _masked(scores, _visible(start, stop, segment_ids, window), (*block, stop), _HIDDEN)
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
