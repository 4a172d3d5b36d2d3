"""The shapes of what a step is given: for planning, and for what the mesh asks of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.rules import Placement
from hybrid_jax.training.phase import Resources

Shape = jax.ShapeDtypeStruct


def row_shape(placement: Placement, rows: int, *rest: int, dtype: Any) -> Shape:
    """The shape of an array of a batch, [rows, *rest]."""
    sharding = placement.row_sharding(1 + len(rest), rows)
    return Shape((rows, *rest), jnp.dtype(dtype), sharding=sharding)


def key_shape(placement: Placement) -> Shape:
    """The shape of a random key."""
    return Shape((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=placement.sharding((), ()))


def rate_shape(placement: Placement) -> Shape:
    """The shape of a single number."""
    return Shape((), jnp.float32, sharding=placement.sharding((), ()))


def check_rows(resources: Resources, setting: str, rows: int) -> None:
    """Every device must have rows to read, and the same number of them.

    Raises:
        UserError: it has not.
    """
    shards = resources.placement.num_row_shards
    if rows % shards:
        raise UserError(
            f"phases.{resources.name}: {setting} must be a multiple of the {shards} parts in which the mesh "
            f"(data × fsdp) splits rows, got {rows}"
        )


def like_rows(placement: Any, shapes: Any) -> Any:
    """Shapes with their rows split like those of a batch."""
    return jax.tree.map(lambda x: row_shape(placement, *x.shape, dtype=x.dtype), shapes)
