"""Quantised weights, read into floats one tensor at a time; what is written is never quantised.

`QUANTISATIONS` has an entry for every ``quant_method`` of a config.json. It takes the tensors of a file by name
and the ``quantization_config``, and gives the names of the plain model with readers that unpack when called.

==================  ==========================================================================================
``fp8``             float8 times a scale for each block of ``weight_block_size`` (DeepSeek, Qwen), or one scale
``fbgemm_fp8``      float8 times a scale for each output
compressed-tensors  ``float-quantized``, ``int-quantized``: one scale, or one for each output or block
``gptq``            integers of 2, 4 or 8 bits, packed along the inputs (Frantar et al. 2022)
``awq``             integers of 4 bits, packed along the outputs in the order of ``gemm`` (Lin et al. 2023)
``bitsandbytes``    a table of 16 numbers (nf4, fp4) and block maxima, or int8 rows (Dettmers et al. 2022, 2023)
``mxfp4``           gpt-oss (`families.mxfp4`)
==================  ==========================================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.families.mxfp4 import unpack_mxfp4
from hybrid_jax.models.families.names import Reader, Tensors, described
from hybrid_jax.models.folders.files import StoredTensor

Settings = Mapping[str, Any]  # of a quantization_config
Unpack = Callable[[Tensors], Tensors]
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which column the k-th 4 bits of a number hold


def unpacker(settings: Any) -> Unpack:
    """The function that makes plain tensors of a folder with this ``quantization_config``.

    Raises:
        UserError: the method is not read, or not in this variant.
    """
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if not isinstance(settings, Mapping) or method not in QUANTISATIONS:
        known = ", ".join(QUANTISATIONS)
        fix = f"take the original weights, or a folder quantised by one of {known}"
        raise UserError(f"weights quantised by {method!r} are not supported: {fix}")
    unpack = partial(QUANTISATIONS[method], settings=settings)
    unpack({})  # refuses a variant before any weight is read
    return unpack


def _check(settings: Settings, name: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """The value of a setting, which must be one of those that are read."""
    value = settings.get(name)
    value = default if value is None else value
    if value not in known:
        raise UserError(
            f"quantization_config: {name} must be one of {', '.join(map(str, known))}, got {value!r}: "
            "take the original weights"
        )
    return value


def _replaced(
    tensors: Tensors,
    mark: str,
    parts: tuple[str, ...],
    optional: tuple[str, ...],
    read: Callable[..., np.ndarray],
) -> Tensors:
    """Every group ``name + mark``, ``name + part`` … becomes the one tensor ``name.weight``.

    ``read`` gets a reader for each part, and None for an optional one that is absent.
    """
    bases = [name.removesuffix(mark) for name in tensors if name.endswith(mark)]
    plain = dict(tensors)
    for base in bases:
        readers: list[Reader | None] = []
        for part in (*parts, *optional):
            reader = plain.pop(base + part, None)
            if reader is None and part in parts:
                raise UserError(
                    f"{described(base + mark, tensors[base + mark])} has no {base + part!r} beside it"
                )
            readers.append(reader)
        first = tensors[base + parts[0]]
        file, finite = getattr(first, "file", None), getattr(first, "check_finite", False)
        whole = partial(_read, base + ".weight", first, read, readers)
        plain[base + ".weight"] = whole if file is None else StoredTensor(file, base + ".weight", whole, finite)
    return plain


def _read(
    name: str, first: Reader, read: Callable[..., np.ndarray], readers: list[Reader | None]
) -> np.ndarray:
    try:
        return read(*(None if reader is None else reader() for reader in readers))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{described(name, first)} cannot be unpacked: {error}") from error


# ------------------------------------------------------------------------------------------------ scaled


def _unpack_scaled(tensors: Tensors, settings: Settings, *, scale: str) -> Tensors:
    """``weight`` of few bits times its ``scale``: of all, of each output, or of each block."""
    block = settings.get("weight_block_size")
    if scale == ".weight_scale" and settings.get("quant_method") == "compressed-tensors":
        _check(settings, "format", ("float-quantized", "int-quantized", "naive-quantized"))
        groups = settings.get("config_groups") or {}
        weights = [(group or {}).get("weights") or {} for group in groups.values()]
        block = next((w["block_structure"] for w in weights if w.get("strategy") == "block"), None)
        if any(w.get("strategy") not in ("tensor", "channel", "block") for w in weights):
            raise UserError("quantization_config: strategy must be tensor, channel or block: take the original")
        if not all(w.get("symmetric", True) for w in weights):
            raise UserError("quantization_config: symmetric must be true: take the original weights")
    if block is not None and not (len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise UserError(f"quantization_config: the size of a block must be two numbers, got {block!r}")
    of_activations = (".activation_scale", ".input_scale", ".output_scale", ".k_scale", ".v_scale")
    kept = {name: read for name, read in tensors.items() if not name.endswith(of_activations)}
    return _replaced(kept, scale, (".weight", scale), (), partial(_scaled, block=block))


def _scaled(weight: np.ndarray, scale: np.ndarray, block: list[int] | None) -> np.ndarray:
    if scale.dtype == np.uint8:  # exponents of 2 (OCP Microscaling Formats 1.0)
        scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    values, scale = weight.astype(np.float32), scale.astype(np.float32)
    if scale.size == 1:
        return values * scale.reshape(())
    if block is None or scale.shape == (*weight.shape[:-1], 1):
        return values * scale.reshape(*weight.shape[:-1], 1)
    rows, columns = block
    grid = (*weight.shape[:-2], math.ceil(weight.shape[-2] / rows), math.ceil(weight.shape[-1] / columns))
    if scale.shape != grid:
        raise ValueError(f"its scales have the shape {list(scale.shape)}, blocks of {block} need {list(grid)}")
    for i in range(grid[-2]):  # one row of blocks at a time: its scales, spelled out, stay small
        factors = np.repeat(scale[..., i, :], columns, axis=-1)[..., : weight.shape[-1]]
        values[..., i * rows : (i + 1) * rows, :] *= factors[..., None, :]
    return values


# ------------------------------------------------------------------------------------------------ integers


def _bits_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers [..., n · 32 / bits] in int32 [..., n], the lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return numbers.astype(np.uint8).reshape(*packed.shape[:-1], -1)


def _unpack_gptq(tensors: Tensors, settings: Settings) -> Tensors:
    """W[i, o] = scales[g, o] · (q[i, o] - zeros[g, o]) with g = g_idx[i]; version 1 keeps zeros - 1."""
    bits = _check(settings, "bits", (2, 4, 8))
    version = _check(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    read = partial(_gptq, bits=bits, added=1 if version == "gptq" else 0)
    return _replaced(tensors, ".qweight", (".qweight", ".qzeros", ".scales"), (".g_idx",), read)


def _gptq(qweight, qzeros, scales, g_idx, bits: int, added: int) -> np.ndarray:
    numbers = _bits_of(qweight.T, bits).T  # [I, O]
    zeros = (_bits_of(qzeros, bits)[:, : numbers.shape[1]] + np.uint8(added)) & np.uint8(2**bits - 1)
    if g_idx is None:
        g_idx = np.arange(len(numbers)) // (len(numbers) // len(scales))
    return _shifted_and_scaled(numbers, zeros, scales, g_idx).T


def _unpack_awq(tensors: Tensors, settings: Settings) -> Tensors:
    """W[i, o] = scales[g, o] · (q[i, o] - zeros[g, o]) with groups of neighbouring inputs."""
    _check(settings, "bits", (4,))
    _check(settings, "version", ("gemm", "GEMM"), "gemm")
    return _replaced(tensors, ".qweight", (".qweight", ".qzeros", ".scales"), (), _awq)


def _awq(qweight, qzeros, scales) -> np.ndarray:
    places = np.argsort(_AWQ_COLUMNS)

    def unpack(packed):
        return _bits_of(packed, 4).reshape(*packed.shape, 8)[..., places].reshape(len(packed), -1)

    numbers = unpack(qweight)
    groups = np.arange(len(numbers)) // (len(numbers) // len(scales))
    return _shifted_and_scaled(numbers, unpack(qzeros), scales, groups).T


def _shifted_and_scaled(numbers, zeros, scales, groups) -> np.ndarray:
    """[I, O], one group of inputs at a time: zeros and scales for every input would be as large."""
    scales, groups = scales.astype(np.float32), np.asarray(groups)
    if groups.shape != numbers.shape[:1] or groups.min(initial=0) < 0 or groups.max(initial=0) >= len(scales):
        raise ValueError(f"g_idx must give one of {len(scales)} groups to each of {len(numbers)} inputs")
    values = numbers.astype(np.float32)
    for group in range(len(scales)):
        rows = np.flatnonzero(groups == group)
        values[rows] = (values[rows] - zeros[group].astype(np.float32)) * scales[group]
    return values


# ------------------------------------------------------------------------------------------------ bitsandbytes


def _unpack_bitsandbytes(tensors: Tensors, settings: Settings) -> Tensors:
    """Linear maps of 4 bits (nf4, fp4: the file holds the table of values) and of 8."""
    in_four = ".weight.quant_state.bitsandbytes__"
    for kind in ("nf4", "fp4"):
        parts = (".weight", ".weight.absmax", ".weight.quant_map", in_four + kind)
        nested = (".weight.nested_absmax", ".weight.nested_quant_map")
        tensors = _replaced(tensors, in_four + kind, parts, nested, _bnb4)
    return _replaced(tensors, ".SCB", (".weight", ".SCB"), (".weight_format",), _bnb8)


def _bnb4(weight, absmax, table, state, nested_absmax, nested_table) -> np.ndarray:
    facts = json.loads(bytes(state.tobytes()).decode("utf-8"))
    shape, block = tuple(facts["shape"]), facts["blocksize"]
    if nested_absmax is not None:  # the maxima are quantised too
        each = np.repeat(nested_absmax.astype(np.float32), facts["nested_blocksize"])[: len(absmax)]
        absmax = nested_table.astype(np.float32)[absmax] * each + np.float32(facts["nested_offset"])
    packed, count = weight.reshape(-1).view(np.uint8), math.prod(shape)
    if count > 2 * len(packed) or math.ceil(count / block) != len(absmax):
        raise ValueError(
            f"{len(packed)} bytes in {len(absmax)} blocks of {block} cannot have the shape {shape}"
        )
    indices = np.stack([packed >> 4, packed & 0xF], axis=-1).reshape(-1)[:count]  # the upper half first
    values = table.astype(np.float32)[indices]
    whole = count // block
    values[: whole * block].reshape(whole, block)[...] *= absmax[:whole, None].astype(np.float32)
    values[whole * block :] *= absmax[whole:].astype(np.float32)
    return values.reshape(shape)


def _bnb8(weight, row_maxima, weight_format) -> np.ndarray:
    if weight.dtype != np.int8 or (weight_format is not None and np.any(weight_format)):
        raise ValueError("only int8 in rows is read")
    return weight.astype(np.float32) * (row_maxima.astype(np.float32) / 127)[:, None]


def _unpack_mxfp4(tensors: Tensors, settings: Settings) -> Tensors:
    return unpack_mxfp4(tensors)


QUANTISATIONS: dict[str, Callable[..., Tensors]] = {
    "fp8": partial(_unpack_scaled, scale=".weight_scale_inv"),
    "fbgemm_fp8": partial(_unpack_scaled, scale=".weight_scale"),
    "compressed-tensors": partial(_unpack_scaled, scale=".weight_scale"),
    "gptq": _unpack_gptq,
    "awq": _unpack_awq,
    "bitsandbytes": _unpack_bitsandbytes,
    "mxfp4": _unpack_mxfp4,
}
