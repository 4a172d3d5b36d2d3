"""From one vector a token to one vector a row: sentence embeddings (Reimers & Gurevych 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hybrid_jax.core.ranges import Count, settings

Mode = Literal["mean", "cls", "max"]


@settings
class Pooling:
    """How a sentence embedding is made of hidden states.

    Attributes:
        mode: the mean over the tokens, the first token, or the largest value of each channel.
        normalize: to length 1, so that a dot product is a cosine.
        max_length: tokens of a sentence to read, the tokenizer cuts what follows. None: all that the model can.
    """

    mode: Mode = "mean"
    normalize: bool = True
    max_length: Count | None = None

    def __call__(
        self, hidden: Float[Array, "B T D"], attention_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B D"]:
        pooled = MODES[self.mode](hidden.astype(jnp.float32), attention_mask)
        return l2_normalized(pooled) if self.normalize else pooled


def mean_pooling(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean over the real tokens; 0 for a row without any."""
    total = jnp.sum(jnp.where(mask[..., None], hidden, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)


def cls_pooling(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The first real token, wherever the padding is."""
    return jnp.take_along_axis(hidden, jnp.argmax(mask, axis=1)[:, None, None], axis=1)[:, 0]


def max_pooling(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Largest value of each channel over the real tokens."""
    return jnp.max(jnp.where(mask[..., None], hidden, -jnp.inf), axis=1)


def l2_normalized(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """``x / |x|``; 0 stays 0."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


MODES: dict[str, Callable[[Array, Array], Array]] = {
    "mean": mean_pooling,
    "cls": cls_pooling,
    "max": max_pooling,
}
