"""Attention for TPUs: the splash kernel of JAX, one row of the batch at a time.

Splash attention ("sparse flash attention") walks over blocks of queries and of the keys that the mask lets
them see; scores and sums are float32 and never leave the chip's fast memory. A block that causality or the
window hides is never read. Queries are scaled beforehand and the length is padded to whole blocks: padding
comes last, so that no real token sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybrid_jax.models.attention.rule import PLAIN, AttentionCall, AttentionRule

_LANES = 128  # the kernel's blocks are multiples of it
_LARGEST_BLOCK = 512  # of queries and of keys; its scores, float32, fill 1 MiB of the chip's fast memory


def reason(call: AttentionCall) -> str | None:
    """The reason why this implementation cannot serve the call."""
    if call.platform != "tpu":
        return f"splash runs on a TPU, not on a {call.platform}"
    if call.dtype not in ("bfloat16", "float32"):
        return f"splash computes in bfloat16 or float32, not in {call.dtype}"
    if call.rule.slopes is not None:
        return "splash has no ALiBi"
    if not call.heads_split_alike:
        return "splash needs the K/V heads split over the mesh as the query heads are"
    return None


def drawback(call: AttentionCall) -> str | None:
    """The reason why einsum serves the call better, where nobody has asked for this one."""
    return (
        f"splash works on blocks of {_LANES} tokens, here are {call.length}" if call.length < _LANES else None
    )


def splash_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    rule: AttentionRule = PLAIN,
    sinks: Float[Array, "H"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """`causal_attention` on one device; ``interpret`` runs the kernel on any device, slowly, for tests."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    length, heads, channels = q.shape[1:]
    padded = -(-length // _LANES) * _LANES
    kernel = _kernel(padded, heads, rule, interpret)

    def row(q, k, v, ids, sinks):  # [H T C]
        return kernel(q, k, v, None if ids is None else SegmentIds(ids, ids), sinks)

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, padded - length)] + [(0, 0)] * (x.ndim - 2))

    q, k, v = (pad(x).swapaxes(1, 2) for x in (q * rule.score_scale(channels), k, v))
    ids = None if segment_ids is None else pad(segment_ids)
    out: Array = jax.vmap(row, in_axes=(0, 0, 0, None if ids is None else 0, None))(q, k, v, ids, sinks)
    return out.swapaxes(1, 2)[:, :length]


def _kernel(length: int, heads: int, rule: AttentionRule, interpret: bool) -> Callable[..., Any]:
    """The function from q [H T C], k and v [K T C], segment ids and sinks to [H T C], with its own gradient."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    one = splash.CausalMask(shape) if rule.window is None else splash.LocalMask(shape, (rule.window - 1, 0), 0)
    size = next(size for size in range(_LARGEST_BLOCK, 0, -_LANES) if length % size == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads),
        block_sizes=blocks,
        attn_logits_soft_cap=rule.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
