"""Dimension letters and masked reductions.

Letters used in every shape annotation, comment and einsum of the package:

    B sequences      T tokens (= P + R)   P prompt tokens   R response tokens   S key/value positions
    V vocabulary     N samples a prompt   D width           H query heads       K key/value heads
    C head channels  F MLP width          L layers          M memory slots      W word width     Y labels
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

TreeT = TypeVar("TreeT")


def masked_sum(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Sum of ``x`` where ``mask``; masked values may be anything, even NaN."""
    return jnp.sum(jnp.where(mask, x, 0.0))


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Mean of ``x`` where ``mask``; 0 for an empty mask."""
    return masked_sum(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def masked_variance(x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Biased variance of ``x`` where ``mask``."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def choose_rows(rows: Bool[Array, "B"], yes: TreeT, no: TreeT) -> TreeT:
    """Takes the rows of ``yes`` that are chosen and of ``no`` the others, of two pytrees of arrays [B …]."""
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)


@struct.dataclass
class Sum:
    """A sum over valid tokens with its weight. Losses and metrics are Sums, divided once, at the end.

    Sums of two halves of a batch add up to the Sum of the whole, so microbatches, padding and the device
    count cannot change a gradient.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]  # how many items were summed

    @classmethod
    def of(cls, x: Float[Array, "..."], mask: Bool[Array, "..."]) -> Sum:
        """Sums ``x`` where ``mask``; masked values may be anything, even NaN."""
        return cls(total=masked_sum(x, mask), weight=jnp.sum(mask, dtype=jnp.float32))

    def mean(self) -> Float[Array, ""]:
        """``total / weight``; 0 for weight 0."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight) * (self.weight != 0)

    def __add__(self, other: Sum) -> Sum:
        return Sum(total=self.total + other.total, weight=self.weight + other.weight)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of each token within its segment, from 0; padding (segment 0) never counts."""
    real = segment_ids > 0
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    last = jax.lax.cummax(jnp.where(real, index, -1), axis=1)  # real token up to here
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    its_segment = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = real & ((before < 0) | (its_segment != segment_ids))
    count = jnp.cumsum(real, axis=1) - 1
    return jnp.where(real, count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1), 0)


def segment_lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of tokens of each token's own segment; padding is one of 1."""
    to_the_end = segment_positions(segment_ids[:, ::-1])[:, ::-1]
    return segment_positions(segment_ids) + to_the_end + 1
