"""Addressing by location of the Neural Turing Machine (Graves et al. 2014, arXiv:1410.5401, section 3.3).

content, gate ─▶ interpolated ─▶ shifted ─▶ sharpened ─▶ the weights of a head
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-30  # its logarithm is finite


def interpolated(
    content: Float[Array, "... M"], before: Float[Array, "... M"], gate: Float[Array, "..."]
) -> Float[Array, "... M"]:
    """``g w_content + (1 − g) w_before`` (eq. 7)."""
    return gate[..., None] * content + (1.0 - gate[..., None]) * before


def shifted(weights: Float[Array, "... M"], shifts: Float[Array, "... S"]) -> Float[Array, "... M"]:
    """The circular convolution ``w(i) ← Σ_j w(j) s(i − j)`` (eq. 8).

    Args:
        weights: of the slots.
        shifts: shares of the shifts by −S // 2, …, 0, …, S // 2; that by +1 moves a weight to the next slot.
    """
    furthest = shifts.shape[-1] // 2
    moved = [jnp.roll(weights, by, axis=-1) for by in range(-furthest, furthest + 1)]
    return jnp.einsum("...s,s...m->...m", shifts, jnp.stack(moved))


def sharpened(weights: Float[Array, "... M"], power: Float[Array, "..."]) -> Float[Array, "... M"]:
    """``w(i)^γ / Σ_j w(j)^γ`` for a power γ ≥ 1 (eq. 9): the softmax of γ log w, which never divides by 0."""
    return jax.nn.softmax(power[..., None] * jnp.log(jnp.maximum(weights, _TINY)))
