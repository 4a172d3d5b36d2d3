"""Attention for NVIDIA GPUs: cuDNN's fused kernel, through `jax.nn.dot_product_attention`.

Without segment ids the kernel is told of causality and of the window and reads no mask. Its sequence lengths
cannot express segments: rows are padded on the left in a rollout, and packed in training. So segments, and with
them the window (a mask and cuDNN's own window exclude each other), are given as a mask [B, 1, T, T], beside
causality, which still lets the kernel pass over what lies ahead. Gradients ask for an even length: an odd one
gets a token more at its end, that no other sees.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.attention.rule import PLAIN, AttentionCall, AttentionRule

_HOPPER = (9, 0)


def reason(call: AttentionCall) -> str | None:
    """The reason why this implementation cannot serve the call."""
    if call.platform != "gpu" or call.capability is None or call.capability < (8, 0):
        return "cudnn needs an NVIDIA GPU of compute capability 8.0 or more"
    if call.dtype not in ("bfloat16", "float16"):
        return f"cudnn computes in bfloat16 or float16, not in {call.dtype}"
    if call.rule.softcap is not None:
        return "cudnn has no soft-cap"
    if call.rule.slopes is not None:
        return "cudnn has no ALiBi"
    if call.sinks:
        return "cudnn has no sinks"
    most = 256 if call.capability >= _HOPPER else 128
    if call.channels % 8 or call.channels > most:
        return f"cudnn's heads have a multiple of 8 channels up to {most}, these have {call.channels}"
    if not call.heads_split_alike:
        return "cudnn needs the K/V heads split over the mesh as the query heads are"
    return None


def drawback(call: AttentionCall) -> str | None:
    """The reason why einsum is the safer choice where nobody has asked for this one."""
    if call.segments:
        return "cudnn would read segments as a mask, which has not been measured on a GPU"
    if call.capability != _HOPPER:
        return "cudnn is known to be faster on compute capability 9.0 only"
    return None


def cudnn_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    rule: AttentionRule = PLAIN,
    sinks: None = None,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H C"]:
    """`causal_attention` on one device; ``backend="xla"`` gives the same arguments to XLA, for tests."""
    length, channels = q.shape[1], q.shape[3]
    attend = partial(
        jax.nn.dot_product_attention,
        scale=rule.score_scale(channels),
        is_causal=True,
        implementation=backend,
    )

    def even(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, length % 2)] + [(0, 0)] * (x.ndim - 2))

    q, k, v = even(q), even(k), even(v)
    if segment_ids is not None:
        return attend(q, k, v, mask=_same_segment(even(segment_ids), rule.window))[:, :length]
    window = None if rule.window is None else (rule.window - 1, 0)
    return attend(q, k, v, local_window_size=window)[:, :length]


def _same_segment(segment_ids: Int[Array, "B T"], window: int | None) -> Bool[Array, "B 1 T T"]:
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if window is None:
        return same
    position = jnp.arange(segment_ids.shape[1])
    return same & (position[:, None] - position < window)
