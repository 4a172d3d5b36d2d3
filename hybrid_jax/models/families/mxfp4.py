"""MXFP4 (OCP Microscaling Formats 1.0), in which gpt-oss is published: read into floats.

A block is 32 numbers of 4 bits (sign, two bits of exponent, one of fraction) and one shared power of 2. Bytes
hold two numbers, the lower half first.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from hybrid_jax.models.families.names import Tensors

_POSITIVE = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_POSITIVE, -_POSITIVE])
_BIAS = 127  # of the shared exponent
_BLOCKS, _SCALES = "_blocks", "_scales"


def unpack_mxfp4(tensors: Tensors) -> Tensors:
    """Every pair ``name_blocks``, ``name_scales`` becomes one tensor ``name``, unpacked when it is read."""
    packed = {name.removesuffix(_BLOCKS) for name in tensors if name.endswith(_BLOCKS)}
    packed = {name for name in packed if name + _SCALES in tensors}
    rest = {
        name: read
        for name, read in tensors.items()
        if name.removesuffix(_BLOCKS) not in packed and name.removesuffix(_SCALES) not in packed
    }
    pairs = {name: (tensors[name + _BLOCKS], tensors[name + _SCALES]) for name in packed}
    return rest | {name: partial(_read, *pair) for name, pair in pairs.items()}


def _read(read_blocks, read_scales) -> np.ndarray:
    """float32 [E I O] of blocks uint8 [E O G 16] and scales uint8 [E O G], with I = 32 G."""
    blocks, scales = read_blocks(), read_scales()
    numbers = np.stack([_VALUES[blocks & 0xF], _VALUES[blocks >> 4]], axis=-1)
    numbers = numbers.reshape(*scales.shape, -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - _BIAS)
    return np.swapaxes(numbers.reshape(*scales.shape[:2], -1), 1, 2)
