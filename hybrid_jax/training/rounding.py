"""Optimizer states in bfloat16: half the memory, rounded without a drift.

bfloat16 has 8 significant bits, so a number can only move by steps of 2⁻⁸ to 2⁻⁷ of itself. A second moment
with β2 = 0.999 falls by at most a thousandth of itself and, rounded to the nearest, does not fall at all.
Rounded up or down at random, up the more often the nearer the upper neighbour, it is right on average.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import BFloat16, Float32, Int, UInt32

_GOLDEN = 0x9E3779B9  # 2³² / golden ratio: multiples of it are far from each other

StateDtype = Literal["float32", "bfloat16"]


class RoundedState(NamedTuple):
    """A state whose arrays are kept in bfloat16; scalars, such as counts, are as they were."""

    count: Int[Array, ""]  # updates so far: no two are rounded with the same noise
    state: Any


def stored_in(dtype: StateDtype, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps ``transform`` so that its float32 arrays are kept in ``dtype``; it still computes in float32."""
    if dtype == "float32":
        return transform

    def init(params: Any) -> RoundedState:
        state = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_moment(x) else x, transform.init(params))
        return RoundedState(count=jnp.zeros((), jnp.int32), state=state)

    def update(updates: Any, state: Any, params: Any = None):
        full = jax.tree.map(lambda x: x.astype(jnp.float32) if _is_kept(x) else x, state.state)
        updates, full = transform.update(updates, full, params)
        kept, structure = jax.tree.flatten(state.state)
        moment = state.count.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
        leaves = [
            round_stochastically(new, _mixed(moment + jnp.uint32(place))) if _is_kept(old) else new
            for place, (old, new) in enumerate(zip(kept, jax.tree.leaves(full), strict=True))
        ]
        return updates, RoundedState(count=state.count + 1, state=jax.tree.unflatten(structure, leaves))

    return optax.GradientTransformation(init, update)


def round_stochastically(x: Float32[Array, "..."], seed: UInt32[Array, ""]) -> BFloat16[Array, "..."]:
    """One of the two bfloat16 numbers around each element, with probabilities that make the mean exact.

    The noise is a hash of seed and place, so it is the same however the array is split over devices.
    """
    noise = _mixed(_places(x.shape) + seed) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The number of each element, modulo 2³²."""
    places, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        places += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return places


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A 32-bit hash: every input bit flips every output bit half of the time (C. Wellons, Hash Prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _is_moment(x: Array) -> bool:
    return x.dtype == jnp.float32 and x.ndim > 0


def _is_kept(x: Array) -> bool:
    return x.dtype == jnp.bfloat16
