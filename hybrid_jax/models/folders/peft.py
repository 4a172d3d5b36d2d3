"""Adapters as folders of `peft`: adapter_config.json and adapter_model.safetensors, both ways.

Their names are those of the modules of `transformers`, so they follow from the weight table of the family:

    base_model.model.<module>.lora_A.weight [r I]    .lora_B.weight [O r]    .lora_magnitude_vector [O]

Where a module of theirs holds several of our maps side by side (``c_attn``), one adapter of theirs is one of
ours for each, with the same A, less what other maps alone use; and ours together are one of theirs, whose rank
is the sum of their ranks:

    A = [A_q A_k A_v]        B = [[B_q 0 0] [0 B_k 0] [0 0 B_v]]
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import Family, parameter_shapes
from hybrid_jax.models.families.weights import Row
from hybrid_jax.models.folders.files import open_safetensors, read_json, save_tensors, write_json
from hybrid_jax.models.lora import Lora, adapters_of, column_norms, nested, params_at, scale_of

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(.+)\.(lora_A|lora_B|lora_magnitude_vector|base_layer)(\.weight)?")
# What the tensors and our own reading of them already say, or what is only about how training began.
_KNOWN = (
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "alpha_pattern",
        "rank_pattern",
        "lora_dropout",
        "use_rslora",
        "use_dora",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("base_model_name_or_path", "revision", "task_type", "peft_version", "auto_mapping", "inference_mode"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
)
_USUAL = {"bias": "none", "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}


def read_settings(lora: Lora | None, model: Decoder) -> Lora | None:
    """``lora``, with the settings of its folder if it names one.

    Raises:
        UserError: it names other settings beside the folder, or the folder's adapter is not supported.
    """
    if lora is None or lora.path is None:
        return lora
    if lora != Lora(path=lora.path):
        raise UserError("lora.path brings rank, alpha, targets and all else: leave the other settings out")
    content = _read_config(Path(lora.path))
    paths = [path for module in _Folder(Path(lora.path), model).modules() for path in module.paths]
    try:
        return Lora(
            rank=content.get("r", 8),
            alpha=float(content.get("lora_alpha", 8)),
            targets="|".join(map(re.escape, paths)),
            dropout=float(content.get("lora_dropout") or 0.0),
            rank_stabilized=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
            path=lora.path,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{Path(lora.path) / ADAPTER_CONFIG}: {error}") from error


def read_adapter(lora: Lora, model: Decoder, base: Params) -> Params:
    """The adapter in the folder ``lora.path``, as `read_settings` has understood it, for the maps of ``base``.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape, or the folder's copy of a map is not
            that of the base (`peft` keeps one of ``lm_head``).
    """
    folder = Path(lora.path or "")
    patterns = read_json(folder / ADAPTER_CONFIG).get("alpha_pattern") or {}
    adapters: dict[str, Params] = {}
    for module in _Folder(folder, model).modules():
        module.check_copy(base)
        a, b = module.factors()
        matching = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module.name))
        scale = scale_of(a.shape[1], next(matching, lora.alpha), lora.rank_stabilized)
        factor = 1.0 if math.isclose(scale, lora.scale, rel_tol=1e-12) else scale / lora.scale
        for path, part, used in zip(module.paths, b, _used(b), strict=True):
            if used.any():
                adapters[path] = {"a": jnp.array(a[:, used]), "b": jnp.array(part[used] * np.float32(factor))}
        if lora.dora:
            for path, part in zip(module.paths, module.magnitudes(), strict=True):
                unmoved = {"a": jnp.array(a), "b": jnp.zeros((a.shape[1], part.size))}
                adapters[path] = {**adapters.get(path, unmoved), "magnitude": jnp.array(part)}
    return nested(adapters)


def _used(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Which columns of a common A each map needs: not those that serve other maps alone, as fused ones do."""
    used = np.stack([part.any(axis=1) for part in parts])
    return list(used | ~used.any(axis=0))


def save_adapter(folder: str | Path, model: LanguageModel, params: Params) -> None:
    """Writes the adapter of a `Pretrained` model alone, as a folder that `peft` loads upon that model.

    Raises:
        UserError: the model has no adapter, or one that `peft` cannot put where ours is.
    """
    folder = Path(folder)
    if not isinstance(model, Decoder) or (lora := model.config.lora) is None:
        raise UserError("the model has no adapter to export: its config has no lora")
    if (base := getattr(model, "folder", None)) is None:
        raise UserError("an adapter needs its base, and this one came from no folder: export the merged model")
    family, bare = _bare(model)
    tensors, ranks, known = {}, {}, []
    adapters = {path: jax.tree.map(np.asarray, adapter) for path, adapter in adapters_of(params).items()}
    for name, row in _linear_rows(family, bare):
        known.append(name)
        fused = _fuse(row, adapters, params)
        if fused is None:
            continue
        if row.ours[0].endswith("/router/kernel"):
            raise UserError(f"peft has no adapters for routers such as {name!r}: export the merged model")
        a, b, magnitude = fused
        flip = family.is_transposed(name.removeprefix(family.prefix))
        ranks[name] = a.shape[1]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b if flip else b.T)
        if lora.dora:
            tensors[f"{_PREFIX}{name}.lora_magnitude_vector"] = magnitude.reshape(-1)
    content = _settings(lora, ranks, known, fan_in_fan_out=not family.transposed)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{WEIGHTS}.unfinished"
    save_tensors(unfinished, tensors)
    os.replace(unfinished, folder / WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, {**content, "base_model_name_or_path": base})


def _settings(
    lora: Lora, ranks: Mapping[str, int], known: list[str], *, fan_in_fan_out: bool
) -> dict[str, Any]:
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
        "bias": "none",
        "inference_mode": True,
    }


def _short_names(chosen: list[str], known: list[str]) -> list[str]:
    """The names that match these modules and no others; within a layer, where all layers have them."""
    within = {name: re.sub(r".*\.\d+\.", "", name) for name in known}
    partly = {within[name] for name in set(known) - set(chosen)}
    return sorted({name if within[name] in partly else within[name] for name in chosen})


def _fuse(row: Row, adapters: Mapping[str, Params], params: Params):
    """A [I R], B and magnitudes in their layout, for the maps of ours that one module of theirs holds."""
    paths = [path.removesuffix("/kernel") for path in row.ours]
    found = [path for path in paths if path in adapters]
    if not found:
        return None
    a = np.concatenate([adapters[path]["a"] for path in found], axis=1)
    parts, magnitudes, first = [], [], 0
    for path in paths:
        kernel = params_at(params, path)["kernel"]
        part = np.zeros((a.shape[1], kernel.shape[1]), np.float32)
        if path in adapters:
            b = adapters[path]["b"]
            part[first : first + b.shape[0]] = b
            first += b.shape[0]
        parts.append(part)
        magnitudes.append(adapters.get(path, {}).get("magnitude"))
        if magnitudes[-1] is None:  # a map that does not move
            magnitudes[-1] = np.asarray(column_norms(jnp.asarray(kernel)))
    return a, row.save(parts)[0], row.save([m[None] for m in magnitudes])[0]


def _linear_rows(family: Family, bare: Decoder) -> Iterator[tuple[str, Row]]:
    """The rows of single linear maps, each with the name of its module."""
    shapes = parameter_shapes(bare)
    for row in family.rows(bare, shapes):
        if all(path.endswith("/kernel") and len(shapes[path].shape) == 2 for path in row.ours):
            yield family.full_name(row.theirs[0]).removesuffix(".weight"), row


def _bare(model: Decoder) -> tuple[Family, Decoder]:
    assert model.config.family is not None, "read from a folder"
    return FAMILIES[model.config.family], Decoder(replace(model.config, lora=None))


def _read_config(folder: Path) -> dict[str, Any]:
    """A checked adapter_config.json: what we would read differently from `peft` is refused."""
    content, file = read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG
    if content.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type must be LORA, got {content.get('peft_type')!r}")
    for name, value in content.items():
        usual = _USUAL.get(name, ())
        if (
            name not in _KNOWN
            and value
            and value != usual
            and not (isinstance(usual, tuple) and value in usual)
        ):
            raise UserError(f"{file}: {name} = {value!r} is not supported")
    return content


@dataclass(frozen=True)
class _Module:
    """The tensors of one module of theirs, and the row of our maps that it is."""

    file: Path
    name: str
    row: Row
    flip: bool  # its map is [out, in]
    tensors: Mapping[str, np.ndarray]
    shapes: Mapping[str, Any]

    @property
    def paths(self) -> list[str]:
        return [path.removesuffix("/kernel") for path in self.row.ours]

    def factors(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """A [I r], and B [r O] for each map of ours."""
        a, b = (np.asarray(self._tensor(name, 2), np.float32) for name in ("lora_A", "lora_B"))
        if a.shape[0] != b.shape[1]:
            raise self._wrong(f"lora_A {list(a.shape)} and lora_B {list(b.shape)} have no common rank")
        inputs = self.shapes[self.row.ours[0]].shape[0]
        if a.shape[1] != inputs:
            raise self._wrong(f"lora_A {list(a.shape)} must have {inputs} columns")
        return a.T, self._parts(b if self.flip else b.T, "lora_B")

    def magnitudes(self) -> list[np.ndarray]:
        flat = np.asarray(self._tensor("lora_magnitude_vector", 1), np.float32)
        parts = self._parts(flat[:, None] if self.flip else flat[None], "lora_magnitude_vector")
        return [part.reshape(-1) for part in parts]

    def check_copy(self, base: Params) -> None:
        if "base_layer" not in self.tensors:
            return
        copies = self.row.load([np.asarray(self.tensors["base_layer"], np.float32)])
        for path, copy in zip(self.paths, copies, strict=True):
            kernel = params_at(base, path)["kernel"]
            same = copy.shape == kernel.shape
            if same and not isinstance(kernel, Tracer):  # one of bfloat16 is rounded
                same = np.allclose(copy, np.asarray(kernel, np.float32), rtol=2**-7, atol=1e-6)
            if not same:
                raise self._wrong("its copy of the base differs from the model's: not the adapter's base")

    def _parts(self, matrix: np.ndarray, name: str) -> list[np.ndarray]:
        """Its columns, in our layout, as those of our maps."""
        try:
            parts = self.row.load([matrix])
        except ValueError as error:
            raise self._wrong(f"{name}: {error}") from error
        for path, part in zip(self.row.ours, parts, strict=True):
            if part.shape[1] != (outputs := self.shapes[path].shape[1]):
                raise self._wrong(f"{name} has {part.shape[1]} outputs, the model {outputs}")
        return parts

    def _tensor(self, name: str, axes: int) -> np.ndarray:
        if name not in self.tensors:
            raise self._wrong(f"{name} is missing")
        if self.tensors[name].ndim != axes:
            raise self._wrong(f"{name} must have {axes} axes, got {list(self.tensors[name].shape)}")
        return self.tensors[name]

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"{self.file}: {self.name}: {problem}")


@dataclass(frozen=True)
class _Folder:
    folder: Path
    model: Decoder

    def modules(self) -> list[_Module]:
        """Every module that the folder has tensors for."""
        family, bare = _bare(self.model)
        file, shapes = self.folder / WEIGHTS, parameter_shapes(bare)
        rows = dict(_linear_rows(family, bare))
        found: dict[str, dict[str, np.ndarray]] = {}
        for full_name, tensor in open_safetensors(file).items():
            match = _NAME.fullmatch(full_name)
            if match is None or match[1] not in rows:
                raise UserError(f"{file}: tensor {full_name!r} has no place in a {family.model_type} model")
            found.setdefault(match[1], {})[match[2]] = tensor()
        if not found:
            raise UserError(f"{file} holds no adapter")
        flips = {name: family.is_transposed(name.removeprefix(family.prefix)) for name in found}
        return [_Module(file, name, rows[name], flips[name], found[name], shapes) for name in found]
