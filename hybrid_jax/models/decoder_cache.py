"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.base import put_rows

EMPTY = -1


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens read so far; rows are left-padded, so all of them write the same slot.

    Token ``slot`` is written into slot ``slot % S``: in a ring, a row can read a new prompt while the others go
    on. Rows `apart` have a slot each, and nothing is written for what they do not read. There is one array a
    layer, [B K S C]; or, where layers are scanned, one a layer of a turn, [n B K S C].
    """

    keys: tuple[Float[Array, "*n B K S C"], ...]
    values: tuple[Float[Array, "*n B K S C"], ...]
    key_positions: Int[Array, "B S"]  # of the token in each slot; EMPTY is none, or padding
    positions: Int[Array, "B"]  # of the next token, padding not counted
    slot: Int[Array, "*B"]  # tokens read so far, padding counted; of all rows, or [B] of rows apart

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

    def apart(self) -> DecoderCache:
        """`SlotCache.apart`."""
        return self.replace(slot=jnp.broadcast_to(self.slot, self.positions.shape))  # pyright: ignore[reportAttributeAccessIssue]

    def next_slots(self, mask: Bool[Array, "B X"]) -> Int[Array, "*B X"]:
        """The slots for more tokens; those that a row apart does not read have none, beyond the last."""
        length, count = self.key_positions.shape[1], mask.shape[1]
        if not self.slot.ndim:
            return (self.slot + jnp.arange(count)) % length
        return jnp.where(mask, self.slot[:, None] + jnp.cumsum(mask, axis=1) - 1, length)

    def take(self, rows: Int[Array, "N"]) -> DecoderCache:
        """`Cache.take`."""
        return DecoderCache(
            keys=tuple(jnp.take(x, rows, axis=-4) for x in self.keys),
            values=tuple(jnp.take(x, rows, axis=-4) for x in self.values),
            key_positions=self.key_positions[rows],
            positions=self.positions[rows],
            slot=self.slot[rows] if self.slot.ndim else self.slot,
        )

    def with_rows(self, rows: Int[Array, "G M"], fresh: DecoderCache) -> DecoderCache:
        """`RefillCache.with_rows`: each prompt ends right before the slot that is written next."""
        shift = 0 if self.slot.ndim else self.slot - fresh.slot

        def put_slots(array: Array, new: Array) -> Array:
            turned = jnp.roll(new, shift, axis=-2)
            put = lambda array, new: put_rows(array, rows, new)  # noqa: E731
            return put(array, turned) if array.ndim == 4 else jax.vmap(put)(array, turned)

        return DecoderCache(
            keys=tuple(map(put_slots, self.keys, fresh.keys)),
            values=tuple(map(put_slots, self.values, fresh.values)),
            key_positions=put_rows(self.key_positions, rows, jnp.roll(fresh.key_positions, shift, axis=1)),
            positions=put_rows(self.positions, rows, fresh.positions),
            slot=put_rows(self.slot, rows, fresh.slot) if self.slot.ndim else self.slot,
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
        """With keys and values from slot ``slot`` on, in several slots [T], or in those of each row [B T]."""
        return self.replace(keys=self._written(self.keys, k, slot), values=self._written(self.values, v, slot))  # pyright: ignore[reportAttributeAccessIssue]

    def read(self) -> tuple[Float[Array, "B K S C"], Float[Array, "B K S C"]]:
        """Keys and values of this layer."""
        if self.turn is None:
            return self.keys, self.values
        keys, values = (lax.dynamic_index_in_dim(x, self.turn, 0, False) for x in (self.keys, self.values))
        return keys, values

    def _written(self, cache: Array, new: Array, slot: Any) -> Array:
        if jnp.ndim(slot) == 2:
            put = jax.vmap(lambda row, slots, new: row.at[:, slots].set(new.swapaxes(0, 1), mode="drop"))
            if self.turn is None:
                return put(cache, slot, new)
            of_turn = put(lax.dynamic_index_in_dim(cache, self.turn, 0, False), slot, new)
            return lax.dynamic_update_index_in_dim(cache, of_turn, self.turn, 0)
        new = new.swapaxes(1, 2)
        if jnp.ndim(slot):  # they may go on at the first slot behind the last
            if self.turn is None:
                return cache.at[:, :, slot].set(new)
            return cache.at[self.turn, :, :, slot].set(jnp.moveaxis(new, 2, 0))
        if self.turn is None:
            return lax.dynamic_update_slice(cache, new, (0, 0, slot, 0))
        return lax.dynamic_update_slice(cache, new[None], (self.turn, 0, 0, slot, 0))
