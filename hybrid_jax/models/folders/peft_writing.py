"""Adapters as folders that `peft` loads; the layout is that of `peft`'s own (`folders.peft`).

Maps of ours that one module of theirs holds are together one adapter of theirs, whose rank is the sum of
their ranks:

    A = [A_q A_k A_v]        B = [[B_q 0 0] [0 B_k 0] [0 0 B_v]]
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families.family import flatten, parameter_shapes
from hybrid_jax.models.families.weights import Row
from hybrid_jax.models.folders.files import CONFIG, read_json, save_tensors, write_json
from hybrid_jax.models.folders.peft import ADAPTER_CONFIG, PREFIX, WEIGHTS
from hybrid_jax.models.folders.peft_module import bare_model, linear_rows
from hybrid_jax.models.lora import ROWS, Lora, adapters_of, column_norms, in_full, overlaid, params_at

_EXPORT_MERGED = "export the merged model"


def save_adapter(folder: str | Path, model: LanguageModel, params: Params) -> None:
    """Writes the adapter of a `Pretrained` model alone, as a folder that `peft` loads upon that model.

    With it go the parts of the base that train in full, and the embeddings of a model whose vocabulary was
    resized: `peft` then needs a base with as many rows (``resize_token_embeddings``).

    Raises:
        UserError: the model has no adapter, or one that `peft` cannot put where ours is.
    """
    folder = Path(folder)
    if not isinstance(model, Decoder) or (lora := model.config.lora) is None:
        raise UserError("the model has no adapter to export: its config has no lora")
    if (base := getattr(model, "folder", None)) is None:
        raise UserError("an adapter needs its base, and this one came from no folder: export the merged model")
    written = _Written()
    model, params = model.as_list(), model.listed(params)
    _add_low_rank(written, lora, model, params)
    _add_full(written, model, params, base)
    content = _settings(lora, written, fan_in_fan_out=not bare_model(model)[0].transposed)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{WEIGHTS}.unfinished"
    save_tensors(unfinished, {f"{PREFIX}{name}": tensor for name, tensor in written.tensors.items()})
    os.replace(unfinished, folder / WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, {**content, "base_model_name_or_path": base})


@dataclass
class _Written:
    """The content of the folder."""

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # of the low-rank adapters, by module
    known: list[str] = field(default_factory=list)  # every module that may have one
    saved: list[str] = field(default_factory=list)  # modules_to_save
    biases: bool = False
    tied: bool = False  # an embedding trains that the head reads, too
    tokens: dict[str, list[int]] = field(default_factory=dict)  # ids whose rows train, by module


def _add_low_rank(written: _Written, lora: Lora, model: Decoder, params: Params) -> None:
    family, bare = bare_model(model)
    adapters = {path: jax.tree.map(np.asarray, adapter) for path, adapter in adapters_of(params).items()}
    shifted = any("shift" in adapter for adapter in adapters.values())
    for name, row in linear_rows(family, bare):
        written.known.append(name)
        paths = [path.rpartition("/")[0] for path in row.ours]
        if not any(path in adapters for path in paths):
            continue
        if row.ours[0].endswith("/router/kernel"):
            raise UserError(f"peft has no adapters for routers such as {name!r}: {_EXPORT_MERGED}")
        if row.ours[0].endswith("/embedding"):
            written.ranks[name] = adapters[paths[0]]["a"].shape[1]
            for kind, leaf in (("A", "a"), ("B", "b")):
                tensor = np.ascontiguousarray(adapters[paths[0]][leaf].T)
                written.tensors[f"{name}.lora_embedding_{kind}"] = tensor
            continue
        a, b, magnitude, shift = _fuse(row, adapters, params)
        flip = family.is_transposed(name.removeprefix(family.prefix))
        written.ranks[name] = a.shape[1]
        written.tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        written.tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b if flip else b.T)
        if lora.dora:
            written.tensors[f"{name}.lora_magnitude_vector"] = magnitude.reshape(-1)
        if shifted:
            written.tensors[f"{name}.lora_B.bias"] = shift.reshape(-1)


def _fuse(row: Row, adapters: Mapping[str, Params], params: Params):
    """A [I R], B, magnitudes and shifts in their layout, for our maps that one module of theirs holds."""
    paths = [path.removesuffix("/kernel") for path in row.ours]
    a = np.concatenate([adapters[path]["a"] for path in paths if path in adapters], axis=1)
    parts, magnitudes, shifts, first = [], [], [], 0
    for path in paths:
        kernel, adapter = params_at(params, path)["kernel"], adapters.get(path, {})
        part = np.zeros((a.shape[1], kernel.shape[1]), np.float32)
        if adapter:
            b = adapter["b"]
            part[first : first + b.shape[0]] = b
            first += b.shape[0]
        parts.append(part)
        magnitude = adapter.get("magnitude")  # None for a map that does not move
        magnitudes.append(np.asarray(column_norms(jnp.asarray(kernel))) if magnitude is None else magnitude)
        shifts.append(adapter.get("shift", np.zeros(kernel.shape[1], np.float32)))
    rows = [row.save([vector[None] for vector in vectors])[0] for vectors in (magnitudes, shifts)]
    return a, row.save(parts)[0], *rows


def _add_full(written: _Written, model: Decoder, params: Params, base: str) -> None:
    """The leaves of the base that train in full, rows of tokens, and the embeddings of a resized model."""
    family, bare = bare_model(model)
    trained = in_full(params)
    leaves = flatten(overlaid(model.config.lora, params)[1])
    embedding, head = (
        name.removesuffix(".weight") for name in (family.full_name(family.embedding), family.head)
    )
    for path, module in (("token_embedding", embedding), ("lm_head", head)):
        if (rows := trained.pop(f"{path}/{ROWS}", None)) is not None:
            written.tokens[module] = list(model.config.lora.tokens if model.config.lora else ())
            written.tensors[f"{module}.token_adapter.trainable_tokens_delta"] = np.asarray(rows)
    rows = [
        (row, [family.full_name(name) for name in row.theirs])
        for row in family.rows(bare, parameter_shapes(bare))
    ]
    is_bias = lambda path: path.endswith("/bias")  # noqa: E731
    written.biases = any(map(is_bias, trained))
    weights = [
        n.removesuffix(".weight")
        for r, ns in rows
        for n in ns
        if any(p in trained and not is_bias(p) for p in r.ours)
    ]
    written.saved = [name for name in weights if name not in written.ranks]
    resized = read_json(Path(base) / CONFIG).get("vocab_size") not in (None, model.vocab_size)
    wanted = {*weights, *((embedding, head) if resized else ())}
    for row, names in rows:
        chosen = [name for name in names if name.rpartition(".")[0] in wanted]
        if not chosen and not any(path in trained for path in row.ours):
            continue
        if not all(name.endswith((".weight", ".bias")) for name in names) or len(names) > 1:
            raise UserError(f"peft keeps no parameters such as {names[0]!r}: {_EXPORT_MERGED}")
        module, _, leaf = names[0].rpartition(".")
        below = ".base_layer" if module in written.ranks else ""
        written.tensors[f"{module}{below}.{leaf}"] = _contiguous(row, leaves)
    if bare.config.tie_embeddings and f"{embedding}.weight" in written.tensors:
        written.tied = embedding in written.saved
        written.tensors[f"{head}.weight"] = written.tensors[f"{embedding}.weight"].copy()


def _contiguous(row: Row, leaves: Mapping[str, Any]) -> np.ndarray:
    return np.ascontiguousarray(row.save([np.asarray(leaves[path], np.float32) for path in row.ours])[0])


def _settings(lora: Lora, written: _Written, *, fan_in_fan_out: bool) -> dict[str, Any]:
    ranks, known = written.ranks, written.known
    others: dict[str, int] = {}
    for rank in set(ranks.values()) - {lora.rank}:
        alike = [name for name in ranks if ranks[name] == rank]
        others |= dict.fromkeys(_short_names(alike, known), rank)
    alphas = {n: lora.scale * (math.sqrt(r) if lora.rank_stabilized else r) for n, r in others.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "target_modules": _short_names(list(ranks), known),
        "rank_pattern": others,
        "alpha_pattern": alphas,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "all" if written.biases else "none",
        "lora_bias": any(name.endswith("lora_B.bias") for name in written.tensors),
        "modules_to_save": written.saved or None,
        "trainable_token_indices": written.tokens or None,
        "ensure_weight_tying": written.tied,
        "inference_mode": True,
    }


def _short_names(chosen: list[str], known: list[str]) -> list[str]:
    """The names that match these modules and no others; within a layer, where all layers have them."""
    within = {name: re.sub(r".*\.\d+\.", "", name) for name in known}
    partly = {within[name] for name in set(known) - set(chosen)}
    return sorted({name if within[name] in partly else within[name] for name in chosen})
