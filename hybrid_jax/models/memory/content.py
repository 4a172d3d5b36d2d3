"""Addressing by content, which the Neural Turing Machine and the differentiable neural computer share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EPSILON = 1e-6  # added to squared lengths: the cosine of an empty slot is 0 and has a gradient


def content_weights(
    memory: Float[Array, "... M W"], keys: Float[Array, "... H W"], strengths: Float[Array, "... H"]
) -> Float[Array, "... H M"]:
    """Weights of the slots by their likeness to a key: ``softmax_i(β cos(k, M_i))``.

    Graves et al. 2014 (arXiv:1410.5401), eq. 5–6; Graves et al. 2016 (doi:10.1038/nature20101), Methods, 𝒞.

    Args:
        memory: M slots of W numbers.
        keys: what each of H heads looks for.
        strengths: β ≥ 0 of each head.
    """
    products = jnp.einsum("...hw,...mw->...hm", keys, memory)
    lengths = _length(keys)[..., :, None] * _length(memory)[..., None, :]
    return jax.nn.softmax(strengths[..., None] * products / lengths)


def read(memory: Float[Array, "... M W"], weights: Float[Array, "... H M"]) -> Float[Array, "... H W"]:
    """The word that each head reads: ``Σ_i w_i M_i``."""
    return jnp.einsum("...hm,...mw->...hw", weights, memory)


def write(
    memory: Float[Array, "... M W"],
    weights: Float[Array, "... H M"],
    erase: Float[Array, "... H W"],
    add: Float[Array, "... H W"],
) -> Float[Array, "... M W"]:
    """The memory after all heads have erased and then all have added: ``M_i Π_h (1 − w_i e) + Σ_h w_i a``.

    Graves et al. 2014, eq. 3–4, where heads of any order give the same.
    """
    kept = jnp.prod(1.0 - weights[..., :, :, None] * erase[..., :, None, :], axis=-3)
    return memory * kept + jnp.einsum("...hm,...hw->...mw", weights, add)


def _length(x: Float[Array, "... W"]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + _EPSILON)
