"""Building blocks of encoders and encoder-decoders: embeddings, norms, attention under any mask."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.layers import layer_norm, product, rms_norm

_HIDDEN = -1e30  # finite: exp gives exactly 0, and a row that sees nothing gives no NaN


def masked_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S H C"],
    v: Float[Array, "B S H C"],
    visible: Bool[Array, "#B 1 #T S"],
    scale: float = 1.0,
    bias: Float[Array, "#B H #T S"] | None = None,
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "B T H C"]:
    """``softmax(scale · q·k + bias) v`` over the visible positions, in float32 (Vaswani et al. 2017).

    ``drop`` is what dropout does to the weights.
    """
    scores = product("bthc,bshc->bhts", q, k) * scale
    scores = scores if bias is None else scores + bias
    weights = drop(jax.nn.softmax(jnp.where(visible, scores, _HIDDEN), axis=-1))
    mixed = product("bhts,bshc->bthc", weights.astype(v.dtype), v)
    return mixed.astype(q.dtype)


class Norm(nn.Module):
    """Layer norm with a bias, or RMS norm without one."""

    epsilon: float
    centered: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        if not self.centered:
            return rms_norm(x, scale, self.epsilon)
        return layer_norm(x, scale, self.param("bias", nn.initializers.zeros, x.shape[-1:]), self.epsilon)


class Embedding(nn.Module):
    """Words, positions and token types, added and normalised."""

    rows: int
    width: int
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, indices: Int[Array, "..."]) -> Float[Array, "... D"]:
        table = self.param("embedding", nn.initializers.normal(self.init_std), (self.rows, self.width))
        return jnp.take(table, indices, axis=0).astype(self.dtype)
