"""Adapters out of folders of `peft`: adapter_config.json and adapter_model.safetensors (or .bin).

Their names are those of the modules of `transformers`, so they follow from the weight table of the family:

    base_model.model.<module>.lora_A.weight [r I]    .lora_B.weight [O r]    .lora_B.bias [O]
                             .lora_magnitude_vector [O]
                             .lora_embedding_A [r V] .lora_embedding_B [D r]
                             .token_adapter.trainable_tokens_delta [n D]        rows, not differences
                             .weight .bias .base_layer.weight …                of the base, trained or copied

Where a module of theirs holds several of our maps side by side (``c_attn``), one adapter of theirs is one
of ours for each, with the same A, less what other maps alone use. What a folder holds of the base itself is
read in its place (`lora.overlaid`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.families.family import parameter_shapes
from hybrid_jax.models.families.weights import Row
from hybrid_jax.models.folders.files import open_safetensors, open_torch
from hybrid_jax.models.folders.peft_config import ADAPTER_CONFIG as ADAPTER_CONFIG
from hybrid_jax.models.folders.peft_config import (
    RESIDUAL_STARTS,
    is_saved,
    of_module,
    read_adapter_config,
    tokens_of,
)
from hybrid_jax.models.folders.peft_module import Module, bare_model, linear_rows
from hybrid_jax.models.lora import ROWS, Lora, nested, params_at, scale_of

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_LOW_RANK = re.compile(
    r"(.+?)\.(lora_A|lora_B|lora_magnitude_vector|lora_embedding_A|lora_embedding_B)(?:\.([^.]+))??(?:\.(weight|bias))?"
)
_TOKENS = re.compile(r"(.+?)\.token_adapter\.trainable_tokens_delta(?:\.([^.]+))?")
_OF_BASE = re.compile(r"(.+?)(\.base_layer|\.modules_to_save(?:\.([^.]+))?)?\.(weight|bias)")


def adapted_config(lora: Lora | None, config: DecoderConfig) -> DecoderConfig:
    """``config`` with ``lora``; if that names a folder, with its settings, and the sizes that it needs.

    Raises:
        UserError: it names other settings beside the folder, or the folder's adapter is not supported.
    """
    if lora is None or lora.path is None:
        return replace(config, lora=lora)
    if lora != Lora(path=lora.path):
        raise UserError("lora.path brings rank, alpha, targets and all else: leave the other settings out")
    folder = _Folder(Path(lora.path), Decoder(config))
    config = replace(config, vocab_size=folder.vocab_size, tie_embeddings=folder.stays_tied)
    folder, content = replace(folder, model=Decoder(config)), folder.content
    targets = [path for module in folder.modules() for path in module.paths]
    full = sorted({path.rpartition("/")[0] for path in folder.full_paths() if not path.endswith("/bias")})
    try:
        read = Lora(
            rank=content.get("r", 8),
            alpha=float(content.get("lora_alpha", 8)),
            targets="|".join(map(re.escape, targets)),
            dropout=float(content.get("lora_dropout") or 0.0),
            rank_stabilized=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
            train_fully="|".join(map(re.escape, full)) or None,
            bias=content.get("bias", "none"),
            tokens=folder.tokens(),
            path=lora.path,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{Path(lora.path) / ADAPTER_CONFIG}: {error}") from error
    return replace(config, lora=read)


def read_adapter(lora: Lora, model: Decoder, base: Params, *, resized: bool = False) -> Params:
    """The adapter in the folder ``lora.path``, as `adapted_config` has understood it, for the maps of ``base``.

    Args:
        lora: the settings.
        model: the decoder above ``base``.
        base: the parameters below the adapter.
        resized: whether the base's own folder has fewer rows: then the folder's embeddings replace the base's.

    Raises:
        UserError: a tensor is missing, left over or of the wrong shape, or the folder's copy of a map is not
            that of the base (`peft` keeps one of ``lm_head``).
    """
    folder = _Folder(Path(lora.path or ""), model, resized)
    patterns = folder.content.get("alpha_pattern") or {}
    start = folder.content.get("init_lora_weights")
    adapters: dict[str, Any] = {}
    for module in folder.modules():
        scale = scale_of(module.rank, of_module(patterns, module.name, lora.alpha), lora.rank_stabilized)
        factor = 1.0 if math.isclose(scale, lora.scale, rel_tol=1e-12) else scale / lora.scale
        if module.is_embedding:
            a, b = module.embedding_factors()
            adapters[module.paths[0]] = {"a": jnp.array(a), "b": jnp.array(b * np.float32(factor))}
            continue
        a, b = module.factors()
        b = [part * np.float32(factor) for part in b]
        if start in RESIDUAL_STARTS:
            a, b = module.with_residual(a, b, base, start, scale, lora.scale)
        for path, part, used in zip(module.paths, b, _used(b), strict=True):
            if used.any():
                adapters[path] = {"a": jnp.array(a[:, used]), "b": jnp.array(part[used])}
        unmoved = lambda part: {"a": jnp.array(a), "b": jnp.zeros((a.shape[1], part.size))}  # noqa: B023, E731
        for path, part in zip(module.paths, module.vectors("lora_magnitude_vector", lora.dora), strict=False):
            adapters[path] = {**adapters.get(path, unmoved(part)), "magnitude": jnp.array(part)}
        for path, part in zip(module.paths, module.vectors("lora_B.bias", False), strict=False):
            shift = jnp.array(part * np.float32(factor))
            adapters[path] = {**adapters.get(path, unmoved(part)), "shift": shift}
    found = {f"{path}/{name}": leaf for path, leaves in adapters.items() for name, leaf in leaves.items()}
    return nested({**found, **folder.full(base), **folder.rows_of_tokens(base)})


def _used(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Which columns of a common A each map needs: not those that serve other maps alone, as fused ones do."""
    used = np.stack([part.any(axis=1) for part in parts])
    return list(used | ~used.any(axis=0))


def same_numbers(a: np.ndarray, b: Any) -> bool:
    """Tells whether two copies of a weight are equal up to the rounding of bfloat16."""
    if a.shape != b.shape:
        return False
    if isinstance(b, Tracer):
        return True
    return bool(np.allclose(a, np.asarray(b, np.float32), rtol=2**-7, atol=1e-6))


class _Tensors(NamedTuple):
    """The tensors of a folder by what they are."""

    low_rank: dict[str, dict[str, np.ndarray]]  # by module
    tokens: dict[str, np.ndarray]  # rows of single tokens, by module
    of_base: dict[str, np.ndarray]  # by the name that the base's folder has
    below: set[str]  # those of_base that lie below a low-rank adapter


@dataclass(frozen=True)
class _Folder:
    """A folder of `peft` above a model."""

    folder: Path
    model: Decoder
    resized: bool = False

    @cached_property
    def content(self) -> dict[str, Any]:
        return read_adapter_config(self.folder)

    @cached_property
    def file(self) -> Path:
        old = self.folder / TORCH_WEIGHTS
        return old if old.is_file() and not (self.folder / WEIGHTS).is_file() else self.folder / WEIGHTS

    @cached_property
    def tensors(self) -> _Tensors:
        """All tensors, without the name of the adapter that older files write into theirs."""
        opened = (open_torch if self.file.name == TORCH_WEIGHTS else open_safetensors)(self.file)
        found, names = _Tensors({}, {}, {}, set()), set()
        for full_name, read in opened.items():
            name = full_name.removeprefix(PREFIX)
            if name == full_name:
                raise UserError(f"{self.file}: tensor {full_name!r} does not begin with {PREFIX!r}")
            if ".original_module." in name:
                continue
            if match := _LOW_RANK.fullmatch(name):
                kind = f"{match[2]}.bias" if match[4] == "bias" else match[2]
                found.low_rank.setdefault(match[1], {})[kind] = read()
                names.add(match[3])
            elif match := _TOKENS.fullmatch(name):
                found.tokens[match[1]] = read()
                names.add(match[2])
            elif match := _OF_BASE.fullmatch(name):
                found.of_base[f"{match[1]}.{match[4]}"] = read()
                found.below.update([f"{match[1]}.{match[4]}"] if match[2] == ".base_layer" else ())
            else:
                raise UserError(f"{self.file}: tensor {full_name!r} is none that an adapter has")
        if len(names) > 1:
            raise UserError(f"{self.file} holds several adapters: {', '.join(sorted(map(str, names)))}")
        if not any((found.low_rank, found.tokens, found.of_base)):
            raise UserError(f"{self.file} holds no adapter")
        return found

    # ------------------------------------------------------------------------------ what the base must be

    @property
    def _embedding(self) -> str:
        family = bare_model(self.model)[0]
        return family.full_name(family.embedding)

    @property
    def _head(self) -> str:
        return bare_model(self.model)[0].head

    @cached_property
    def vocab_size(self) -> int:
        """Rows that the embedding has below the adapter: `peft` writes it where it was resized."""
        sizes = [
            t.shape[0] for n in (self._embedding, self._head) if (t := self.tensors.of_base.get(n)) is not None
        ]
        return max([self.model.vocab_size, *sizes])

    @cached_property
    def stays_tied(self) -> bool:
        """Tells whether head and embedding are still one table: `peft` trains one of two without the other."""
        if not self.model.config.tie_embeddings:
            return False
        modules = {**self.tensors.low_rank, **{name: {} for name in self.tensors.tokens if name == "lm_head"}}
        if {self._embedding.removesuffix(".weight"), self._head.removesuffix(".weight")} & modules.keys():
            return False
        of_base, ensured = self.tensors.of_base, bool(self.content.get("ensure_weight_tying"))
        embedding, head = of_base.get(self._embedding), of_base.get(self._head)
        embedding_trains, head_trains = (is_saved(self.content, n) for n in (self._embedding, self._head))
        if head is None:
            return embedding is None or ensured or not embedding_trains
        if embedding is None or not np.array_equal(head, embedding):
            return False
        return ensured or not (embedding_trains and head_trains)

    # ------------------------------------------------------------------------------ its parts

    def modules(self) -> list[Module]:
        """Every module that the folder has low-rank tensors for."""
        family, bare = bare_model(self.model)
        rows, shapes = dict(linear_rows(family, bare)), parameter_shapes(bare)
        for name, tensors in self.tensors.low_rank.items():
            kinds = {kind for kind in tensors if kind.startswith("lora_embedding")}
            if name not in rows or bool(kinds) != rows[name].ours[0].endswith("/embedding"):
                shown = f"{PREFIX}{name}.{next(iter(tensors))}"
                shown += "" if "embedding" in shown else ".weight"
                raise UserError(f"{self.file}: tensor {shown!r} has no place in a {family.model_type} model")
        flips = {n: family.is_transposed(n.removeprefix(family.prefix)) for n in self.tensors.low_rank}
        found = self.tensors.low_rank.items()
        return [Module(self.file, name, rows[name], flips[name], kinds, shapes) for name, kinds in found]

    def _replaced(self) -> Iterator[tuple[Row, list[np.ndarray]]]:
        """The rows of the base's table that the folder holds, with the folder's tensors."""
        family, bare = bare_model(self.model)
        left = dict(self.tensors.of_base)
        if self.model.config.tie_embeddings:
            left.pop(self._head, None)
        for row in family.rows(bare, parameter_shapes(bare)):
            names = [family.full_name(name) for name in row.theirs]
            if all(name in left for name in names):
                yield row, [left.pop(name) for name in names]
        if left:
            name = f"{PREFIX}{next(iter(left))}"
            raise UserError(f"{self.file}: tensor {name!r} has no place in a {family.model_type} model")

    def _is_trained(self, row: Row) -> bool:
        """Tells whether the folder's tensors of a row replace the base's, or only repeat them."""
        family = bare_model(self.model)[0]
        name = family.full_name(row.theirs[0])
        is_bias = self.content.get("bias", "none") != "none" and all(p.endswith("/bias") for p in row.ours)
        is_resized = self.resized and name in (self._embedding, self._head)
        return is_bias or is_resized or is_saved(self.content, name)

    def full_paths(self) -> list[str]:
        """The paths of our leaves that the folder holds in full, trained."""
        return [path for row, _ in self._replaced() if self._is_trained(row) for path in row.ours]

    def full(self, base: Params) -> dict[str, jax.Array]:
        """Our leaves that the folder holds in full, by path."""
        found = {}
        for row, tensors in self._replaced():
            name = row.theirs[0].removesuffix(".weight")
            try:
                parts = row.load([np.asarray(tensor, np.float32) for tensor in tensors])
            except ValueError as error:
                raise UserError(f"{self.file}: {name}: {error}") from error
            for path, part in zip(row.ours, parts, strict=True):
                module, _, leaf = path.rpartition("/")
                own = params_at(base, module)[leaf]
                if not self._is_trained(row):
                    if not same_numbers(part, own):
                        problem = "its copy of the base differs from the model's: not the adapter's base"
                        raise UserError(f"{self.file}: {name}: {problem}")
                elif part.shape != own.shape:
                    raise UserError(
                        f"{self.file}: {name} has the shape {list(part.shape)}, the model {list(own.shape)}"
                    )
                else:
                    found[path] = jnp.array(part)
        return found

    def tokens(self) -> tuple[int, ...]:
        """The ids whose own rows train, in the embedding or in the head."""
        return tuple(sorted({i for module in self.tensors.tokens for i in tokens_of(self.content, module)}))

    def rows_of_tokens(self, base: Params) -> dict[str, jax.Array]:
        """The rows of these tokens; the base's own where the folder has only those of the other table."""
        found, ids = {}, list(self.tokens())
        paths = {self._embedding: "token_embedding/embedding", self._head: "lm_head/kernel"}
        for module, rows in self.tensors.tokens.items():
            own, path = tokens_of(self.content, module), paths.get(f"{module}.weight", "")
            width = self.model.config.embedding_width or self.model.width
            if not path or rows.shape != (len(own), width):
                raise UserError(f"{self.file}: {module}: {list(rows.shape)} are not the rows of {list(own)}")
            owner, _, leaf = path.rpartition("/")
            table: Any = params_at(base, owner)[leaf]
            if ids and ids[-1] >= self.model.vocab_size:
                raise UserError(f"{self.file}: {module}: the model has no row {ids[-1]}")
            table = table if path == paths[self._embedding] else table.T
            chosen = jnp.take(table, jnp.asarray(ids), axis=0).astype(jnp.float32)
            places = jnp.asarray([ids.index(i) for i in own])
            found[f"{owner}/{ROWS}"] = chosen.at[places].set(np.asarray(rows, np.float32))
        return found
