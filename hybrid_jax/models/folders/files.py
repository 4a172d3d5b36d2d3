"""The files of a Hugging Face folder: tensors read one by one and written shard by shard, and JSON.

A safetensors file is 8 bytes with the length of its header, the header (JSON: name, dtype, shape and place of
each tensor) and the tensors, one behind the other (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, decode, open_regular
from hybrid_jax.core.json_text import parse_json, read_json
from hybrid_jax.models.families.names import unwrapped

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARDS = "model-?????-of-?????.safetensors"
MOST_HEADER = 25 * MEBIBYTE  # of a safetensors file; 100,000 tensors need half of it
MOST_AXES = 8  # of a tensor
_ABOUT = "__metadata__"  # the entry of a header that is no tensor
_UNFINISHED = ".unfinished"  # folder in which an export is written
_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_},
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
    "C64": np.complex64,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. A call gives it: of safetensors a view of the file, so nothing is read before use."""

    file: Path
    name: str
    read: Callable[[], np.ndarray]
    check_finite: bool = False

    def __call__(self) -> np.ndarray:
        array = self.read()
        if self.check_finite and not is_finite(array):
            raise UserError(f"{self.file}: tensor {self.name!r} holds NaN or infinity")
        return array


def read_model_config(folder: Path) -> dict[str, Any]:
    """Reads a config.json: `transformers` before version 5 wrote ``Infinity`` in that of a Mamba-2."""
    return read_json(folder / CONFIG, infinity=True)


def is_finite(array: np.ndarray) -> bool:
    """Tells whether no number is NaN or infinite."""
    with np.errstate(invalid="ignore"):  # ml_dtypes warns at the very NaN that is asked for
        return bool(np.isfinite(array).all())


# ------------------------------------------------------------------------------------------------ reading


def has_weights(folder: Path) -> bool:
    """Tells whether a folder holds a file of weights, or an index of such files."""
    return any((folder / name).is_file() for name in (INDEX, WEIGHTS, TORCH_INDEX, TORCH))


def open_weights(folder: Path, check_finite: bool = False) -> tuple[Path, dict[str, StoredTensor]]:
    """The file that holds or lists a folder's weights, and what reads each tensor.

    Raises:
        UserError: there are no weights, a file is missing or damaged, or a tensor is not where the index says.
    """
    for name in (INDEX, WEIGHTS, TORCH_INDEX, TORCH):
        file = folder / name
        if file.is_file():
            opened = open_safetensors if name in (INDEX, WEIGHTS) else open_torch
            read = partial(opened, check_finite=check_finite)
            tensors = _open_shards(file, read) if name in (INDEX, TORCH_INDEX) else read(file)
            return file, _unwrapped(tensors)
    raise UserError(f"{folder} holds no weights: expected {WEIGHTS}, {INDEX} or {TORCH}")


def _unwrapped(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    named: dict[str, StoredTensor] = {}
    for full_name, tensor in tensors.items():
        if (name := unwrapped(full_name)) in named:
            raise UserError(f"{tensor.file}: tensor {name!r} is also there as {named[name].name!r}")
        named[name] = tensor
    return named


def _open_shards(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise UserError(f"{index}: 'weight_map' must say for each tensor in which file it is")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise UserError(f"{index}: a shard must lie beside it, got {shard!r}")
        for name, tensor in read(index.parent / shard).items():
            if name in tensors:
                raise UserError(f"{tensor.file}: tensor {name!r} is also in {tensors[name].file.name}")
            if name not in placed:
                raise UserError(f"{tensor.file}: tensor {name!r} is not listed in {index.name}")
            tensors[name] = tensor
    for name, shard in placed.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise UserError(f"{index.parent / shard}: tensor {name!r} is missing, {index.name} lists it there")
    return tensors


def open_safetensors(path: Path, check_finite: bool = False) -> dict[str, StoredTensor]:
    """Readers of the tensors of one safetensors file, by name.

    Raises:
        UserError: it is missing or damaged.
    """
    header, start, size = _read_header(path)
    header.pop(_ABOUT, None)
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: tensor {name!r} has the dtype {entry['dtype']}, which is not supported")
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, stop = (start + offset for offset in entry["data_offsets"])
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: not a whole safetensors file: tensor {name!r} is not where it should be")
        if stop > size:
            raise UserError(f"{path}: not a whole safetensors file: it ends before tensor {name!r} does")
        read = partial(_view, path, dtype, shape, begin)
        tensors[name], end = StoredTensor(path, name, read, check_finite), stop
    if end != size:
        raise UserError(f"{path}: not a whole safetensors file: {size - end} bytes belong to no tensor")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors.

    Raises:
        UserError: it is missing or damaged.
    """
    return _read_header(path)[0].get(_ABOUT, {})


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The entries of a safetensors file, where its data begin, and the size of the file."""
    with open_regular(path, "weight file") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: not a whole safetensors file: it ends before its header does")
        if length > MOST_HEADER:
            raise UserError(
                f"{path}: its header must have at most {MOST_HEADER // MEBIBYTE} MiB, got {length // MEBIBYTE}"
            )
        content = file.read(length)
    header = parse_json(decode(content, f"{path}: its header"), f"{path}: its header")
    try:
        about = header.get(_ABOUT, {})
        if not (isinstance(about, dict) and all(isinstance(text, str) for text in about.values())):
            raise ValueError("its metadata must be texts")
        for entry in (entry for name, entry in header.items() if name != _ABOUT):
            begin, stop = entry["data_offsets"]
            whole = [begin, stop, *entry["shape"]]
            is_tensor = all(isinstance(i, int) and i >= 0 for i in whole) and _is_array(entry["shape"])
            if not isinstance(entry["dtype"], str) or not is_tensor:
                raise ValueError("an entry is not understood")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file: its header is damaged: {error}") from error
    return header, 8 + length, size


def _is_array(shape: list[int]) -> bool:
    """Tells whether numpy can have such an array, one without elements too."""
    return len(shape) <= MOST_AXES and math.prod(max(size, 1) for size in shape) < 2**48


def _view(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """The tensor in the file: its pages leave the memory with the view."""
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape).view(np.ndarray)


def open_torch(path: Path, check_finite: bool = False) -> dict[str, StoredTensor]:
    """Readers of the tensors of one file of PyTorch, by name; nothing in it is executed.

    Raises:
        UserError: it is missing or no plain file of tensors, or PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        problem = "needs PyTorch to be read: pip install torch, or save it as safetensors"
        raise UserError(f"{path} {problem}") from error
    if not path.is_file():
        raise UserError(f"no weight file {str(path)!r}")
    try:
        # Only the files of newer versions are zip archives, whose tensors can be left on the disk.
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises whatever the archive made it stumble over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: not a plain PyTorch weight file: {reason}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: not a plain PyTorch weight file: it holds a {type(state).__name__}")
    if wrong := [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]:
        raise UserError(f"{path}: not a plain PyTorch weight file: {wrong[0]!r} is no tensor")
    readers = {name: partial(_from_torch, tensor) for name, tensor in state.items()}
    return {name: StoredTensor(path, name, read, check_finite) for name, read in readers.items()}


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# ------------------------------------------------------------------------------------------------ writing


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    contents: Mapping[str, Mapping[str, Any]],
    max_shard_bytes: float,
) -> None:
    """Writes weights and JSON files so that the folder loads as a whole or not at all.

    Everything is written beside, then moved in, config.json last; before it moves, the old one is taken away.

    Args:
        folder: an earlier export in it is replaced.
        tensors: in order; they are taken one by one, and as many as fit into a shard are held at a time.
        contents: of the JSON files by name.
        max_shard_bytes: of one weight file, unless a single tensor is larger.
    """
    beside = folder / _UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write_shards(beside, tensors, max_shard_bytes)
        for name, content in contents.items():
            write_json(beside / name, content)
        (folder / CONFIG).unlink(missing_ok=True)
        for old in (WEIGHTS, INDEX, *(path.name for path in folder.glob(_SHARDS))):
            (folder / old).unlink(missing_ok=True)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: float) -> None:
    """One file, or several with an index; only the last of them knows how many they are."""
    shards: list[list[str]] = []
    total, held, size = 0, {}, 0

    def flush() -> None:
        save_tensors(folder / str(len(shards)), held)
        shards.append(list(held))
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > max_bytes:
            flush()
            size = 0
        held[name] = array
        total, size = total + array.nbytes, size + array.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "0", folder / WEIGHTS)
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names):
        os.replace(folder / str(i), folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that those may read whom the umask lets read any new file."""
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})  # for the owner alone, whatever the umask is
    usual = path.with_name(path.name + ".mode")
    usual.touch()
    path.chmod(stat.S_IMODE(usual.stat().st_mode))
    usual.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
