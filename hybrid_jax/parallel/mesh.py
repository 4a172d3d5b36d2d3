"""Makes the mesh of devices that a config asks for, and moves host arrays to it and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, Sharding

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.parallel.rules import AXES, Placement

T = TypeVar("T")


@settings
class MeshConfig:
    """How the devices share the work. The product of the three sizes is the number of devices that are used.

    Several slices of TPUs, or hosts of GPUs, are joined by a slower network. ``data`` is split over them first:
    where it is a multiple of their number, little but gradients travels between them. Where it is not, ``fsdp``
    is split over them too, and ``tensor`` last.

    Attributes:
        data: Copies of the model, each reading its own rows.
        fsdp: Parts in which parameters and optimizer states are kept; each part reads its own rows, too.
        tensor: Parts in which every layer is computed.
    """

    data: Count = 1
    fsdp: Count = 1
    tensor: Count = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes of the mesh axes, in the order of `AXES`."""
        return self.data, self.fsdp, self.tensor

    def placement(self, devices: Sequence[Any] | None = None) -> Placement:
        """Lays the mesh over the first of ``devices`` (default: all that JAX sees).

        Raises:
            UserError: there are too few, or, with several processes, some would be left out, or those of a
                part of a TPU form no block, or the slices would have unequal parts.
        """
        there = jax.devices() if devices is None else list(devices)
        wanted = int(np.prod(self.shape))
        product = f"mesh {self.data} × {self.fsdp} × {self.tensor}"
        if wanted > len(there):
            raise UserError(
                f"{product} needs {wanted} devices, got {len(there)}; make data, fsdp or tensor smaller"
            )
        if jax.process_count() > 1 and devices is None and wanted < len(there):
            raise UserError(f"{product} must use all {len(there)} devices of all processes, got {wanted}")
        arranged = arrange(self.shape, there[:wanted], product)
        return Placement(Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def arrange(shape: tuple[int, ...], devices: Sequence[Any], name: str) -> np.ndarray:
    """Arranges devices in an array of this shape, in the order that suits the networks between them.

    A physical axis of a TPU slice is split where it must be, which `jax.make_mesh` does on some TPUs only.

    Args:
        shape: sizes of the mesh axes, those that communicate most last.
        devices: as many as the product of ``shape``.
        name: of the mesh, for an error.

    Raises:
        UserError: the devices of a TPU form no block, or the slices do not have equally many.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(sizes := {len(members) for members in slices.values()}) > 1:
        raise UserError(
            f"{name} must use equally many devices of each of the {len(slices)} slices, got "
            f"{' and '.join(map(str, sorted(sizes)))}; make data a multiple of the slices, or use all devices"
        )
    between = split_over_slices(shape, len(slices))
    within = tuple(size // parts for size, parts in zip(shape, between, strict=True))
    try:
        arranged = [
            mesh_utils.create_device_mesh(within, slices[index], allow_split_physical_axes=True)
            for index in sorted(slices)
        ]
    except AssertionError:  # what JAX says is longer than a screen
        raise UserError(
            f"{name} takes {math.prod(within)} devices of a TPU slice, which form no block; use all of them"
        ) from None
    # [slices of data, of fsdp, of tensor, data, fsdp, tensor] -> each axis its slices first
    blocks = np.stack(arranged).reshape(*between, *within)
    axes = [
        axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair
    ]
    return blocks.transpose(axes).reshape(shape)


def split_over_slices(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
    """Splits the mesh axes over slices: the first takes as many slices as it can, then the next.

    Their product is the number of slices wherever that divides the product of ``shape``.
    """
    between = []
    for size in shape:
        between.append(math.gcd(size, slices))
        slices //= between[-1]
    return tuple(between)


def put_rows(placement: Placement, batch: T) -> T:
    """Puts a batch of host arrays [B ...] on the devices, each with its share of the rows.

    Every process gives the whole batch and puts only the rows of its own devices.
    """

    def put(array: np.ndarray) -> jax.Array:
        sharding = placement.row_sharding(np.ndim(array), len(array))
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index])

    return jax.tree.map(put, batch)


def rows_here(array: jax.Array) -> np.ndarray:
    """Lists the rows of an array [B ...] that this process holds, ascending."""
    return np.array(
        sorted({row for shard in array.addressable_shards for row in _rows(shard, len(array))}), int
    )


def fetch_rows(array: jax.Array) -> np.ndarray:
    """Fetches the rows that this process holds (`rows_here`); nothing travels between processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    rows = {
        row: (shard, i) for shard in array.addressable_shards for i, row in enumerate(_rows(shard, len(array)))
    }
    held = {id(shard): np.asarray(shard.data) for shard, _ in rows.values()}
    return np.stack([held[id(shard)][i] for _, (shard, i) in sorted(rows.items())])


def gather_rows(placement: Placement, here: np.ndarray, num_rows: int) -> np.ndarray:
    """Gathers all rows [B ...] on every process out of those that each holds: for a few numbers a row."""
    if jax.process_count() == 1:
        return here
    sharding = placement.row_sharding(here.ndim, num_rows)
    split = jax.make_array_from_process_local_data(sharding, here, (num_rows, *here.shape[1:]))
    return np.asarray(_replicated(placement.sharding((), ()))(split).addressable_data(0))


@functools.cache
def _replicated(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """A function that copies an array to all devices, compiled once for each shape and not at every call."""

    def gather(x):
        return x

    return jax.jit(gather, out_shardings=sharding)


def whole_array(array: Any) -> np.ndarray:
    """Fetches a whole array to the host, in every process where it lies on devices of several.

    Then all processes must call it, and their devices hold the whole of this one array meanwhile.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))


def _rows(shard: Any, num_rows: int) -> range:
    return range(*shard.index[0].indices(num_rows)) if shard.index else range(0)
