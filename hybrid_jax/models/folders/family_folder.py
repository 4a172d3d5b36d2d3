"""A model's folder and its family together: what decoders, encoders and classifiers load and save alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Sharding

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import suggest
from hybrid_jax.models.base import Params
from hybrid_jax.models.families.family import Family, Place, dump_weights, load_weights
from hybrid_jax.models.folders.files import (
    CONFIG,
    is_finite,
    open_weights,
    read_json,
    read_model_config,
    write_model,
)
from hybrid_jax.models.folders.host_copy import packed
from hybrid_jax.models.folders.quantised import unpacker
from hybrid_jax.parallel import hosts

Dtype = Literal["float32", "bfloat16", "float16"]
Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding]  # of all leaves, or by path and shape
GENERATION = "generation_config.json"


def read_config(folder: Path, families: Mapping[str, Family]) -> tuple[Family, Any, dict[str, Any]]:
    """The family that a folder's config.json names, our settings, and the file's content.

    Raises:
        UserError: the family is unknown, the weights are quantised in a format that is not read, or a setting
            is missing or not supported.
    """
    content = read_model_config(folder)
    model_type = str(content.get("model_type"))
    if model_type not in families:
        known = suggest(model_type, list(families))
        raise UserError(f"{folder}: unknown model_type {model_type!r}; {known}")
    family, quantization = families[model_type], content.pop("quantization_config", None)
    try:
        if quantization:
            unpack = unpacker(quantization)
            if not family.transposed:  # whose maps lie the other way round, in formats that nobody publishes
                raise UserError(f"quantised weights of a {model_type} are not supported: take the original")
            family = replace(family, unpack=unpack)
        return family, family.read_config(content), content
    except KeyError as error:
        raise UserError(f"{folder / CONFIG}: {error.args[0]!r} is missing") from error
    except (ValueError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error


def read_params(
    folder: Path,
    family: Family,
    model: Any,
    *,
    dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> Params:
    """The parameters of ``model`` out of a folder, tensor by tensor.

    Beside the parameters, no more than one of them is in memory at a time.

    Args:
        folder: with weights.
        family: that the names are of.
        model: whose ``init`` gives the wanted parameters.
        dtype: of the parameters.
        sharding: where they lie; a process reads only its own part. None is the default device.
        check_finite: refuse NaN and infinity.
    """
    file, tensors = open_weights(folder, check_finite)
    return load_weights(family, model, dict(tensors), placement(dtype, sharding), str(file))


def placement(dtype: Dtype, sharding: Shardings | None = None) -> Place:
    """How an array becomes a parameter."""

    def place(path: str, array: np.ndarray) -> jax.Array:
        if sharding is None:
            placed = jax.device_put(packed(array, jax.numpy.dtype(dtype)))
        else:
            where = sharding if isinstance(sharding, Sharding) else sharding(path, array.shape)
            placed = jax.make_array_from_callback(
                array.shape, where, lambda index: packed(array[index], jax.numpy.dtype(dtype))
            )
        return jax.block_until_ready(placed)  # else the copies for the device would pile up

    return place


def family_of(
    config: Any, families: Mapping[str, Family], content: Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that a model is exported as, and its config.json.

    That is ``config.family`` where it is set, else the first that can express the model. ``content`` is a
    config.json whose other settings shall survive.
    """
    if (name := getattr(config, "family", None)) is not None:
        if name not in families:
            raise UserError(f"unknown family {name!r}; {suggest(name, list(families))}")
        return families[name], families[name].write_config(config, content)
    misfits: dict[str, list[str]] = {}
    refusals: dict[str, list[str]] = {}
    for family in families.values():
        try:
            theirs = family.their_config(config, content)
            differences = family.differences(config, theirs)
        except (UserError, ValueError) as error:  # a value that the family does not know
            refusals[family.model_type] = [str(error)]
            continue
        if not differences:
            return family, family.write_config(config, content)
        misfits[family.model_type] = [f"{name} {got!r} instead of {ours!r}" for name, ours, got in differences]
    misfits = misfits or refusals
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise UserError(
        f"no Hugging Face family can express this model; the nearest is {nearest}, which has "
        f"{', '.join(misfits[nearest])}"
    )


def content_like(like: str | Path | None, name: str, family: str | None) -> dict[str, Any]:
    """A JSON file of the folder that an export shall be like, if it is there and of the same family."""
    if like is None or not (Path(like) / name).is_file():
        return {}
    if read_model_config(Path(like)).get("model_type") != family:
        return {}
    content = read_json(Path(like) / name)
    content.pop("quantization_config", None)  # what we write is not quantised
    return content


def token_ids(content: dict[str, Any], eos_ids: Sequence[int], pad_id: int | None) -> dict[str, Any]:
    """The ids in a config.json: those that are given, else those of ``content``."""
    eos = list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), content.get("eos_token_id"))
    pad = content.get("pad_token_id") if pad_id is None else pad_id
    return {"bos_token_id": content.get("bos_token_id"), "eos_token_id": eos, "pad_token_id": pad}


def write_folder(
    folder: Path,
    family: Family,
    model: Any,
    params: Params,
    contents: Mapping[str, Mapping[str, Any]],
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes the parameters and JSON files: a whole folder or none.

    Raises:
        UserError: the parameters are not those of the model, or not finite in this dtype.
    """
    written = np.dtype(jax.numpy.dtype(dtype))

    def tensors():
        for name, array in dump_weights(family, model, params):
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
                cast = array.astype(written, copy=False)
            yield name, _finite(name, array, cast)

    if hosts.is_first():
        write_model(folder, tensors(), contents, max_shard_bytes)
    else:
        for _ in tensors():  # each is gathered from all processes, and written by one
            pass


def _finite(name: str, ours: np.ndarray, written: np.ndarray) -> np.ndarray:
    if is_finite(written):
        return written
    if not is_finite(ours):
        raise UserError(f"parameter {name!r} holds NaN or infinity, so the model is not exported")
    raise UserError(f"parameter {name!r} is too large for {written.dtype}; export as bfloat16 or float32")
