"""A bank of slots beside a model: keys to look for and values to be found, of each row its own.

What is remembered has no gradient; what looks for it has. Nothing is trained in a bank, so it can stand beside
any model, be kept between calls, and be emptied.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.base import put_rows

_EMPTY = -1
_NOWHERE = -1e30  # a score that no softmax weighs


@struct.dataclass
class Bank:
    """Slots of some rows. Writing takes the slot that was used longest ago, an empty one first.

    A slot is used when it is written: first in, first out. Where reading counts, too (`touched`), the slot goes
    that was neither written nor read for longest.
    """

    keys: Float[Array, "B N D"]
    values: Any  # [B N ...]
    used: Int[Array, "B N"]  # when each slot was used last; -1 is empty
    clock: Int[Array, "B"]  # uses so far

    @classmethod
    def empty(cls, rows: int, slots: int, key_width: int, value_shape: tuple[int, ...] = (), dtype=jnp.float32):
        """A bank in which nothing was written."""
        values = jnp.zeros((rows, slots, *value_shape), dtype)
        keys = jnp.zeros((rows, slots, key_width))
        return cls(keys, values, jnp.full((rows, slots), _EMPTY), jnp.zeros(rows, jnp.int32))

    def written(
        self, keys: Float[Array, "B X D"], values: Array, where: Bool[Array, "B X"] | None = None
    ) -> Bank:
        """With X further pairs, one after the other.

        Args:
            keys: of the pairs.
            values: [B X ...], what is found by them.
            where: False writes nothing; None writes all.
        """
        where = jnp.ones(keys.shape[:2], bool) if where is None else where

        def one(bank: Bank, pair: tuple[Array, Array, Array]) -> tuple[Bank, None]:
            key, value, real = pair
            rows = jnp.arange(len(real))
            slot = jnp.where(real, jnp.argmin(bank.used, axis=1), bank.used.shape[1])  # that is none
            return Bank(
                keys=bank.keys.at[rows, slot].set(key, mode="drop"),
                values=bank.values.at[rows, slot].set(value, mode="drop"),
                used=bank.used.at[rows, slot].set(bank.clock, mode="drop"),
                clock=bank.clock + real,
            ), None

        pairs = (jax.lax.stop_gradient(keys), jax.lax.stop_gradient(values), where)
        return jax.lax.scan(one, self, jax.tree.map(lambda x: x.swapaxes(0, 1), pairs))[0]

    def weights(self, queries: Float[Array, "B D"], scale: float) -> Float[Array, "B N"]:
        """The softmax of ``scale q · k`` over the slots that hold something; all 0 where none does."""
        return masked_weights(jnp.einsum("bd,bnd->bn", queries, self.keys), self.used != _EMPTY, scale)

    def read(self, queries: Float[Array, "B D"], scale: float) -> Float[Array, "B ..."]:
        """The values by these weights: attention over the slots, 0 of an empty bank."""
        return jnp.einsum("bn,bn...->b...", self.weights(queries, scale), self.values)

    def touched(self, weights: Float[Array, "B N"]) -> Bank:
        """With the slot that was read most as used just now; empty slots stay empty."""
        rows, slot = jnp.arange(len(weights)), jnp.argmax(weights, axis=1)
        now = jnp.where(jnp.any(weights > 0, axis=1), self.clock, self.used[rows, slot])
        used = self.used.at[rows, slot].set(now)
        return Bank(self.keys, self.values, used, self.clock + 1)

    def take(self, rows: Int[Array, "R"]) -> Bank:
        """The banks of some rows, in that order."""
        return jax.tree.map(lambda x: x[rows], self)

    def with_rows(self, rows: Int[Array, "G M"], fresh: Bank) -> Bank:
        """With other banks at some rows, as `RefillCache.with_rows` has it."""
        return jax.tree.map(lambda x, new: put_rows(x, rows, new), self, fresh)


def masked_weights(
    products: Float[Array, "... N"], mask: Bool[Array, "... N"], scale: float
) -> Float[Array, "... N"]:
    """The softmax of ``scale`` times the products where the mask is True; 0 elsewhere, also without any True.

    No row has a gradient of NaN.
    """
    scores = jnp.where(mask, scale * products, _NOWHERE)
    return jnp.where(mask, jax.nn.softmax(scores), 0.0)
