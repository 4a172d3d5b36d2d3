"""Encoders out of Hugging Face folders and back: plain, with a head, and of sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import read_text
from hybrid_jax.core.json_text import MOST_BYTES, parse_json
from hybrid_jax.models.base import Params
from hybrid_jax.models.encoder import Encoder
from hybrid_jax.models.families.encoders import ENCODERS
from hybrid_jax.models.families.family import load_weights
from hybrid_jax.models.families.names import Tensors
from hybrid_jax.models.folders.family_folder import (
    Dtype,
    Shardings,
    family_of,
    placement,
    read_config,
    write_folder,
)
from hybrid_jax.models.folders.files import CONFIG, open_weights, read_json, write_json
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.pooling import Mode, Pooling

_MODULES, _SENTENCES = "modules.json", "sentence_bert_config.json"
_POOLING = "1_Pooling"
_TYPES = "sentence_transformers.models."
_MODES: dict[str, Mode] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def load_encoder(
    folder: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> tuple[Encoder, Params]:
    """Reads an encoder; its ``config.json`` decides the family and the head.

    Args:
        folder: of a ``*Model``, ``*ForSequenceClassification``, ``*ForTokenClassification`` or
            ``*ForQuestionAnswering`` of BERT, RoBERTa, XLM-RoBERTa or DistilBERT, or of sentence-transformers
            (``modules.json`` says how to pool). Of a ``*ForMaskedLM`` or ``*ForPreTraining`` the encoder is
            read and the head left. Or the id of such a model on the hub.
        dtype: of the computation.
        param_dtype, sharding, check_finite: as in `hf.load_pretrained`.

    Raises:
        UserError: the family or the pooling is unknown, a file is missing or damaged, a tensor is missing, left
            over or of the wrong shape.
    """
    folder = find_folder(folder)
    body, pooling = _read_modules(folder) if (folder / _MODULES).is_file() else (folder, None)
    family, config, _ = read_config(body, ENCODERS)
    file, stored = open_weights(body, check_finite)
    tensors: Tensors = {_new_name(name): read for name, read in stored.items()}
    has_pooler = bool({"pooler.dense.weight", family.prefix + "pooler.dense.weight"} & tensors.keys())
    needs_pooler = config.head == "sequence" and config.head_reads == "pooler"
    model = Encoder(replace(config, dtype=dtype, pooler=has_pooler or needs_pooler), pooling)
    return model, load_weights(family, model, tensors, placement(param_dtype, sharding), str(file))


def save_encoder(
    folder: str | Path,
    model: Encoder,
    params: Params,
    *,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `transformers`, or sentence-transformers where the model has a pooling, loads.

    The tokenizer's files are not written: they are the caller's.

    Raises:
        UserError: no family can express the encoder, or the parameters are not those of the model.
    """
    folder = Path(folder)
    family, config = family_of(model.config, ENCODERS)
    named = replace(family, prefix="") if model.config.head is None else family
    contents = {CONFIG: {**config, "dtype": dtype}}
    write_folder(folder, named, model, params, contents, dtype=dtype, max_shard_bytes=max_shard_bytes)
    (folder / _MODULES).unlink(missing_ok=True)
    if model.pooling is not None:
        _write_modules(folder, model, model.pooling)


def _new_name(name: str) -> str:
    """Norms of the first BERT files have the names of TensorFlow."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# ------------------------------------------------------------------------------------ sentence-transformers


def _read_modules(folder: Path) -> tuple[Path, Pooling]:
    """(folder of the encoder, how its hidden states become sentences)"""
    try:
        modules = {module["type"].rpartition(".")[2]: module for module in _read_list(folder / _MODULES)}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / _MODULES}: every module must have a type") from error
    for module in modules.values():
        if not isinstance(path := module.get("path", ""), str) or Path(path).name != path:
            raise UserError(f"{folder / _MODULES}: the path of a module must lie beside it, got {path!r}")
    if extra := modules.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{folder / _MODULES}: module {min(extra)!r} is not supported")
    if missing := {"Transformer", "Pooling"} - modules.keys():
        raise UserError(f"{folder / _MODULES}: module {min(missing)!r} is missing")
    body = folder / modules["Transformer"].get("path", "")
    mode = _read_mode(folder / modules["Pooling"].get("path", _POOLING) / "config.json")
    length = read_json(body / _SENTENCES).get("max_seq_length") if (body / _SENTENCES).is_file() else None
    return body, Pooling(mode, "Normalize" in modules, length)


def _read_mode(path: Path) -> Mode:
    content = read_json(path)
    # newer files name the mode, older ones have a switch for each
    chosen = [key for key, on in content.items() if key.startswith("pooling_mode_") and on is True]
    named = chosen or [f"pooling_mode_{content.get('pooling_mode')}_tokens".replace("cls_tokens", "cls_token")]
    if len(named) != 1 or named[0] not in _MODES:
        raise UserError(f"{path}: the pooling must be one of {', '.join(_MODES.values())}, got {named}")
    return _MODES[named[0]]


def _read_list(path: Path) -> list[Any]:
    content = parse_json(read_text(path, MOST_BYTES), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list, got {type(content).__name__}")
    return content


def _write_modules(folder: Path, model: Encoder, pooling: Pooling) -> None:
    paths = {"Transformer": "", "Pooling": _POOLING} | (
        {"Normalize": "2_Normalize"} if pooling.normalize else {}
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": _TYPES + kind}
        for i, (kind, path) in enumerate(paths.items())
    ]
    (folder / _MODULES).write_text(json.dumps(modules, indent=2) + "\n")
    write_json(folder / _SENTENCES, {"max_seq_length": model.max_length, "do_lower_case": False})
    for path in list(paths.values())[1:]:
        (folder / path).mkdir(exist_ok=True)
    modes = {key: mode == pooling.mode for key, mode in _MODES.items()}
    content = {"word_embedding_dimension": model.width, **modes, "pooling_mode_mean_sqrt_len_tokens": False}
    write_json(folder / _POOLING / "config.json", content)
