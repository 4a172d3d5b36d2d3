"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from hybrid_jax.models.base import put_rows

EMPTY = -1


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens read so far; rows are left-padded, so all of them write the same slot.

    Token ``slot`` is written into slot ``slot % S``: in a ring, a row can read a new prompt while the others go
    on. There is one array a layer, [B K S C]; or, where layers are scanned, one a layer of a turn, [n B K S C].
    """

    keys: tuple[Float[Array, "*n B K S C"], ...]
    values: tuple[Float[Array, "*n B K S C"], ...]
    key_positions: Int[Array, "B S"]  # of the token in each slot; EMPTY is none, or padding
    positions: Int[Array, "B"]  # of the next token, padding not counted
    slot: Int[Array, ""]  # tokens read so far, padding counted

    def grown(self, length: int) -> DecoderCache:
        """`SlotCache.grown`."""
        more = length - self.key_positions.shape[1]

        def grow(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

        return DecoderCache(
            keys=tuple(map(grow, self.keys)),
            values=tuple(map(grow, self.values)),
            key_positions=jnp.pad(self.key_positions, ((0, 0), (0, more)), constant_values=EMPTY),
            positions=self.positions,
            slot=self.slot,
        )

    def take(self, rows: Int[Array, "N"]) -> DecoderCache:
        """`Cache.take`."""
        return DecoderCache(
            keys=tuple(jnp.take(x, rows, axis=-4) for x in self.keys),
            values=tuple(jnp.take(x, rows, axis=-4) for x in self.values),
            key_positions=self.key_positions[rows],
            positions=self.positions[rows],
            slot=self.slot,
        )

    def with_rows(self, rows: Int[Array, "G M"], fresh: DecoderCache) -> DecoderCache:
        """`RefillCache.with_rows`: each prompt ends right before the slot that is written next."""
        shift = self.slot - fresh.slot

        def put_slots(array: Array, new: Array) -> Array:
            turned = jnp.roll(new, shift, axis=-2)
            put = lambda array, new: put_rows(array, rows, new)  # noqa: E731
            return put(array, turned) if array.ndim == 4 else jax.vmap(put)(array, turned)

        return DecoderCache(
            keys=tuple(map(put_slots, self.keys, fresh.keys)),
            values=tuple(map(put_slots, self.values, fresh.values)),
            key_positions=put_rows(self.key_positions, rows, jnp.roll(fresh.key_positions, shift, axis=1)),
            positions=put_rows(self.positions, rows, fresh.positions),
            slot=self.slot,
        )

    def layers(self) -> list[LayerCache]:
        """The cache of each layer, or of each layer of a turn."""
        return [LayerCache(k, v) for k, v in zip(self.keys, self.values, strict=True)]


@struct.dataclass
class LayerCache:
    """Keys and values of one layer; ``turn`` says where it is in a stack."""

    keys: Float[Array, "*n B K S C"]
    values: Float[Array, "*n B K S C"]
    turn: Int[Array, ""] | None = None

    def write(self, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], slot: Any) -> LayerCache:
        """With keys and values in the slots from ``slot`` on, or in each of several slots."""
        return self.replace(keys=self._written(self.keys, k, slot), values=self._written(self.values, v, slot))  # pyright: ignore[reportAttributeAccessIssue]

    def read(self) -> tuple[Float[Array, "B K S C"], Float[Array, "B K S C"]]:
        """Keys and values of this layer."""
        if self.turn is None:
            return self.keys, self.values
        keys, values = (lax.dynamic_index_in_dim(x, self.turn, 0, False) for x in (self.keys, self.values))
        return keys, values

    def _written(self, cache: Array, new: Array, slot: Any) -> Array:
        new = new.swapaxes(1, 2)
        if jnp.ndim(slot):  # they may go on at the first slot behind the last
            if self.turn is None:
                return cache.at[:, :, slot].set(new)
            return cache.at[self.turn, :, :, slot].set(jnp.moveaxis(new, 2, 0))
        if self.turn is None:
            return lax.dynamic_update_slice(cache, new, (0, 0, slot, 0))
        return lax.dynamic_update_slice(cache, new[None], (self.turn, 0, 0, slot, 0))
