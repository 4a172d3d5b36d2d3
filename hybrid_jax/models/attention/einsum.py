"""Attention as it is written down: every score at once. The oracle of the other implementations.

It serves every call on every device, and is what decoding uses everywhere: one query over a cache is bound
by reading the cache, which XLA's own fusions already do at full speed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.attention.rule import PLAIN, AttentionRule
from hybrid_jax.models.layers import product

HIDDEN = -1e30  # finite: exp gives exactly 0 and no NaN can arise


def plain_attention(q, k, v, segment_ids=None, rule=PLAIN, sinks=None):
    """`causal_attention` as it is written down."""
    length, _, channels = q.shape[1:]
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    grouped = rearrange(q, "b t (k g) c -> b t k g c", k=k.shape[2])
    scores = product("btkgc,bskc->bkgts", grouped, k)
    weights = _weights(scores, visible[:, None, None], distance, rule, channels, sinks)
    out = product("bkgts,bskc->btkgc", weights.astype(v.dtype), v)
    return rearrange(out, "b t k g c -> b t (k g) c").astype(q.dtype)


def cached_attention(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    visible: Bool[Array, "B S"],
    distance: Int[Array, "B S"],
    rule: AttentionRule = PLAIN,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B H C"]:
    """Attention of one query a row over the cached tokens that are ``visible``.

    ``distance`` is how many tokens each of them is behind the query.
    """
    grouped = rearrange(q, "b (k g) c -> b k g c", k=keys.shape[1])
    scores = jnp.einsum("bkgc,bksc->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    behind = distance[:, None, None, None]
    weights = _weights(scores[..., None, :], visible[:, None, None, None], behind, rule, q.shape[-1], sinks)
    weights = weights[..., 0, :]
    out = jnp.einsum(
        "bkgs,bksc->bkgc", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    return rearrange(out, "b k g c -> b (k g) c").astype(q.dtype)


def _weights(
    scores: Float[Array, "B K G T S"],
    visible: Bool[Array, "B #K #G #T S"],
    distance: Int[Array, "*#B T S"],
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
    scores = jnp.where(visible, scores, HIDDEN)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sink = jnp.broadcast_to(sinks.reshape(*scores.shape[1:3], 1, 1), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]
