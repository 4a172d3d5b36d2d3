"""Hugging Face folders in and out: config.json, safetensors (one file or shards), generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.registry import UserError, suggest
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import Family, dump_weights, load_weights

_WEIGHTS, _INDEX, _TORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def load_pretrained(
    folder: str | Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[Decoder, Params]:
    """Reads a Hugging Face folder; its ``config.json`` decides the family.

    Args:
        folder: Holds config.json and model.safetensors (or shards with their index, or pytorch_model.bin).
        dtype: Of the computation; parameters are float32 always.

    Raises:
        UserError: The family is unknown, a file is missing or damaged, a tensor is missing, left over,
        there twice
            or of the wrong shape.
    """
    folder = Path(folder)
    family, model = _read_model(folder, dtype)
    tensors = {name: partial(_itself, array) for name, array in _read_tensors(folder).items()}
    params = load_weights(
        family, model, tensors, lambda path, array: jnp.asarray(np.ascontiguousarray(array, np.float32))
    )
    return model, params


def _itself(array):
    return array


def save_pretrained(
    folder: str | Path,
    model: Decoder,
    params: Params,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Writes a folder that `transformers` loads, of the first family that can express the decoder."""
    from safetensors.numpy import save_file

    family, config = _family_of(model.config)
    eos = list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None)
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad_id}
    header = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": "float32"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(dump_weights(family, model, params)), folder / _WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / "config.json", {**header, **config, **ids})
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


@BACKBONES.register("pretrained")
@dataclass(frozen=True)
class Pretrained:
    """A backbone that starts from a Hugging Face folder."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: float | None = None  # the folder's

    def build(self, vocab_size: int | None = None) -> PretrainedDecoder:
        config = _read_model(Path(self.path), self.dtype)[1].config
        if self.dropout is not None:
            config = replace(config, dropout=self.dropout)
        if vocab_size is not None and config.vocab_size is not None and config.vocab_size < vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, more than the {config.vocab_size} of {self.path!r}"
            )
        return PretrainedDecoder(config, self.path)


@dataclass(frozen=True)
class PretrainedDecoder(Decoder):
    """A decoder whose `init` reads its folder: the key is not used. Call it outside `jax.jit`."""

    folder: str

    def init(self, key) -> Params:
        return load_pretrained(self.folder)[1]


def _family_of(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    problems = []
    for family in [FAMILIES[config.family]] if config.family else FAMILIES.values():
        try:
            return family, family.write_config(config)
        except (UserError, ValueError) as error:
            problems.append(str(error))
    raise UserError(f"no Hugging Face family can express this decoder: {'; '.join(problems)}")


def _read_model(folder: Path, dtype: str) -> tuple[Family, Decoder]:
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{folder}: unknown model_type {model_type!r}; {suggest(str(model_type), FAMILIES)}")
    family = FAMILIES[model_type]
    try:
        decoder = replace(family.read_config(config), dtype=dtype)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'}: {error.args[0]!r} is missing") from error
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    return family, Decoder(decoder)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if (folder / _WEIGHTS).is_file():
        return _read_safetensors(folder / _WEIGHTS)
    if (folder / _TORCH).is_file():
        return _read_torch(folder / _TORCH)
    raise UserError(f"{folder} holds no weights: expected {_WEIGHTS}, {_INDEX} or {_TORCH}")


def _read_shards(folder: Path) -> dict[str, np.ndarray]:
    placed = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(placed, dict):
        raise UserError(f"{folder / _INDEX}: 'weight_map' is missing")
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(placed.values())):
        held = _read_safetensors(folder / shard)
        if twice := tensors.keys() & held.keys():
            raise UserError(f"{folder / shard}: tensor {min(twice)!r} is in two shards")
        tensors |= held
    if missing := placed.keys() - tensors.keys():
        raise UserError(f"{folder}: tensor {min(missing)!r} is missing from shard {placed[min(missing)]}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise UserError(f"no weight file {str(path)!r}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch to be read: pip install torch, or save it as safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.to(torch.float32).numpy() for name, tensor in state.items()}
    except Exception as error:  # torch raises whatever the archive made it stumble over
        raise UserError(f"{path}: not a plain PyTorch weight file: {str(error).splitlines()[0]}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no file {str(path)!r}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
