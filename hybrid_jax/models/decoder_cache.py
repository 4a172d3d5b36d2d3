"""Keys and values of the tokens that a decoder has read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens read so far; rows are left-padded, so all of them write the same slot.

    Token ``slot`` is written into slot ``slot % S``: in a ring, a row can read a new prompt while the others go
    on. There is one array a layer, [B K S C]; or, where layers are scanned, one a layer of a turn, [n B K S C].
    """

    keys: tuple[Float[Array, "*n B K S C"], ...]
    values: tuple[Float[Array, "*n B K S C"], ...]
    key_mask: Bool[Array, "B S"]
    positions: Int[Array, "B"]  # of the next token, padding not counted
    slot: Int[Array, ""]  # tokens read so far, padding counted

    def grown(self, length: int) -> DecoderCache:
        """`SlotCache.grown`."""
        more = length - self.key_mask.shape[1]

        def grow(x: Array) -> Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

        return DecoderCache(
            keys=tuple(map(grow, self.keys)),
            values=tuple(map(grow, self.values)),
            key_mask=jnp.pad(self.key_mask, ((0, 0), (0, more))),
            positions=self.positions,
            slot=self.slot,
        )

    def with_rows(self, rows: Int[Array, "G M"], fresh: DecoderCache) -> DecoderCache:
        """`SlotCache.with_rows`: each prompt ends right before the slot that is written next."""
        shift = self.slot - fresh.slot

        def put(array: Array, new: Array) -> Array:
            split = lambda x: x.reshape(len(rows), -1, *x.shape[1:])  # noqa: E731
            return jax.vmap(_put)(split(array), split(new), rows).reshape(array.shape)

        def put_slots(array: Array, new: Array) -> Array:
            turned = jnp.roll(new, shift, axis=-2)
            return put(array, turned) if array.ndim == 4 else jax.vmap(put)(array, turned)

        return DecoderCache(
            keys=tuple(map(put_slots, self.keys, fresh.keys)),
            values=tuple(map(put_slots, self.values, fresh.values)),
            key_mask=put(self.key_mask, jnp.roll(fresh.key_mask, shift, axis=1)),
            positions=put(self.positions, fresh.positions),
            slot=self.slot,
        )

    def layers(self) -> list[LayerCache]:
        return [LayerCache(k, v) for k, v in zip(self.keys, self.values, strict=True)]


def _put(array: Array, new: Array, rows: Int[Array, "M"]) -> Array:
    return array.at[rows].set(new, mode="drop")


@struct.dataclass
class LayerCache:
    """What one layer reads and writes; ``turn`` says where it is in a stack."""

    keys: Float[Array, "*n B K S C"]
    values: Float[Array, "*n B K S C"]
    turn: Int[Array, ""] | None = None

    def write(self, k: Float[Array, "B T K C"], v: Float[Array, "B T K C"], slot: Any) -> LayerCache:
        """With keys and values in the slots from ``slot`` on."""
        return self.replace(keys=self._written(self.keys, k, slot), values=self._written(self.values, v, slot))  # pyright: ignore[reportAttributeAccessIssue]

    def read(self) -> tuple[Float[Array, "B K S C"], Float[Array, "B K S C"]]:
        if self.turn is None:
            return self.keys, self.values
        keys, values = (lax.dynamic_index_in_dim(x, self.turn, 0, False) for x in (self.keys, self.values))
        return keys, values

    def _written(self, cache: Array, new: Array, slot: Any) -> Array:
        new = new.swapaxes(1, 2)
        if self.turn is None:
            return lax.dynamic_update_slice(cache, new, (0, 0, slot, 0))
        return lax.dynamic_update_slice(cache, new[None], (self.turn, 0, 0, slot, 0))
