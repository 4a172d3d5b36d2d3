"""Checksums of arrays, taken where they lie, and of files."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Shaped, UInt32


@jax.jit
def weighted_sum(array: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Computes ``Σ_i (2 i + 1) bits_i  mod 2³²`` over the elements in row-major order.

    Integer sums have no order, so it is the same however the array is split over devices, and no device or host
    needs the whole. The weights are odd, so a change of any one element changes it.

    Args:
        array: of at most 32 bits an element.
    """
    array = jax.device_put(array, jax.memory.Space.Device)  # what is idle may wait in the host's memory
    if array.dtype == bool:
        bits = array.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)  # modulo 2³², like the sum
    stride = 1
    for axis in reversed(range(array.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """Computes a checksum of every leaf by path: `weighted_sum` of JAX arrays, CRC-32 on the host."""
    leaves = tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    spread = {path: leaf for path, leaf in found.items() if _is_spread(leaf)}
    found = {path: _checksum(leaf) for path, leaf in found.items() if path not in spread}
    found |= _weighted_sums(spread) if spread else {}
    return {path: int(checksum) for path, checksum in sorted(jax.device_get(found).items())}


def differing(tree: Any, expected: dict[str, int]) -> str | None:
    """The path of the first leaf whose checksum is not the expected one."""
    found = checksums(tree)
    return next((path for path, checksum in found.items() if checksum != expected.get(path)), None)


def shapes(tree: Any) -> dict[str, str]:
    """Describes every leaf by its path, as ``float32[2, 3]``."""
    leaves = [(p, x if hasattr(x, "shape") else np.asarray(x)) for p, x in tree_leaves_with_path(tree)]
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def sum_of_bits(tree: Any) -> int:
    """One number for a whole tree."""
    return zlib.crc32(repr(sorted(checksums(tree).items())).encode())


@jax.jit
def _weighted_sums(arrays: dict[str, Array]) -> dict[str, Array]:
    """Sums in one program, since devices that add up many arrays together, in a program each, can block."""
    return {path: weighted_sum(array) for path, array in arrays.items()}


def _is_spread(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _checksum(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.dtype.itemsize <= 4:
        return weighted_sum(leaf)
    return zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8))  # pyright: ignore[reportArgumentType]


def file_names(folder: Path, but: str) -> list[str]:
    """The files below a folder, without those of one name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != but)
    return sorted(str(path.relative_to(folder)) for path in paths)


def file_checksums(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Size and CRC-32 of files below a folder."""
    return {name: _file_checksum(folder / name) for name in names}


def _file_checksum(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]
