"""Heads: small pure functions over the hidden states of a backbone."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.models.base import Params
from hybrid_jax.models.layers import linear


def init_value_head(width: int) -> Params:
    """A value head that says 0 everywhere: until it learns, advantages are those of the rewards alone."""
    return {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros((1,))}


def value(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """``V = hidden · w + b``, float32: one number a position."""
    return linear(hidden.astype(jnp.float32), params["kernel"], params["bias"])[..., 0]
