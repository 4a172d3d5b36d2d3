"""Addressing of the differentiable neural computer (Graves et al. 2016, doi:10.1038/nature20101, Methods).

Slots are found by content, allocated by how little they are used, and followed in the order of writing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def usage_after(
    usage: Float[Array, "... M"],
    write_weights: Float[Array, "... M"],
    read_weights: Float[Array, "... R M"],
    free_gates: Float[Array, "... R"],
) -> Float[Array, "... M"]:
    """``u ← (u + w − u ∘ w) ∘ ψ`` with what reading frees, ``ψ = Π_r (1 − f_r w_r)``.

    Args:
        usage: of the slots, in [0, 1].
        write_weights: w, where the step before has written.
        read_weights: where the step before has read.
        free_gates: f, the share of each head's slots that it frees.
    """
    retention = jnp.prod(1.0 - free_gates[..., None] * read_weights, axis=-2)
    return (usage + write_weights - usage * write_weights) * retention


def allocation(usage: Float[Array, "... M"]) -> Float[Array, "... M"]:
    """Weights for the least used slots: ``a[φ_j] = (1 − u[φ_j]) Π_{i<j} u[φ_i]``, φ by rising usage.

    The order has no gradient, as in the paper; of equal slots the first comes first. Sums to 1 − Π u.
    """
    order = jnp.argsort(usage, axis=-1)
    rising = jnp.take_along_axis(usage, order, axis=-1)
    before = jnp.cumprod(rising, axis=-1)[..., :-1]
    before = jnp.concatenate([jnp.ones_like(rising[..., :1]), before], axis=-1)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis((1.0 - rising) * before, back, axis=-1)


def write_weights(
    content: Float[Array, "... M"],
    allocated: Float[Array, "... M"],
    allocation_gate: Float[Array, "..."],
    write_gate: Float[Array, "..."],
) -> Float[Array, "... M"]:
    """``w = g_w (g_a a + (1 − g_a) c)``; sums to at most 1."""
    gate = allocation_gate[..., None]
    return write_gate[..., None] * (gate * allocated + (1.0 - gate) * content)


def link_after(
    link: Float[Array, "... M M"], precedence: Float[Array, "... M"], weights: Float[Array, "... M"]
) -> Float[Array, "... M M"]:
    """``L[i, j] ← (1 − w_i − w_j) L[i, j] + w_i p_j`` off the diagonal: slot i was written right after slot j.

    Args:
        link: L, whose rows and columns sum to at most 1.
        precedence: p, before this step.
        weights: w, of this step's writing.
    """
    after, before = weights[..., :, None], weights[..., None, :]
    link = (1.0 - after - before) * link + after * precedence[..., None, :]
    return link * (1.0 - jnp.eye(link.shape[-1]))


def precedence_after(
    precedence: Float[Array, "... M"], weights: Float[Array, "... M"]
) -> Float[Array, "... M"]:
    """``p ← (1 − Σ w) p + w``: how much each slot was the last that was written."""
    return (1.0 - weights.sum(axis=-1, keepdims=True)) * precedence + weights


def read_weights(
    link: Float[Array, "... M M"],
    before: Float[Array, "... R M"],
    content: Float[Array, "... R M"],
    modes: Float[Array, "... R 3"],
) -> Float[Array, "... R M"]:
    """``w_r = π_1 Lᵀ w_r + π_2 c_r + π_3 L w_r``: back in the order of writing, by content, or on.

    Args:
        link: L, after this step's writing.
        before: where each head has read in the step before.
        content: c, weights by content in the memory after writing.
        modes: π, shares of backward, content and forward, in this order.
    """
    backward = jnp.einsum("...ji,...rj->...ri", link, before)
    forward = jnp.einsum("...ij,...rj->...ri", link, before)
    return jnp.sum(modes[..., None, :] * jnp.stack([backward, content, forward], axis=-1), axis=-1)
