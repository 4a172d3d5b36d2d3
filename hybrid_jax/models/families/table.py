"""Weight tables: how a Hugging Face family maps to our parameter tree and back, complete or fail.

A table is a list of rows ``(our paths, their names, transform)``; a transform is a pair of functions over
lists of arrays. Most rows hold one path and one name. A fused tensor of theirs is a row of several paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np

from hybrid_jax.core.registry import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig

T = TypeVar("T")
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Transform:
    load: Callable[[list[np.ndarray]], list[np.ndarray]]  # theirs to ours
    save: Callable[[list[np.ndarray]], list[np.ndarray]]  # ours to theirs


AS_IS = Transform(lambda arrays: arrays, lambda arrays: arrays)
# PyTorch's Linear keeps [out, in], a kernel here is [in, out].
TRANSPOSED = Transform(lambda arrays: [a.T for a in arrays], lambda arrays: [a.T for a in arrays])
# One tensor of theirs holds three of ours side by side (GPT-2's query, key, value).
THIRDS = Transform(
    lambda arrays: np.split(arrays[0], 3, axis=-1), lambda arrays: [np.concatenate(arrays, axis=-1)]
)


@dataclass(frozen=True)
class Row:
    ours: tuple[str, ...]  # paths like "layer_0/mlp/up/kernel"
    theirs: tuple[str, ...]
    transform: Transform = AS_IS


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face: its config both ways and its weight table."""

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]  # UserError where the family cannot express it
    rows: Callable[[DecoderConfig], list[Row]]
    prefix: str = ""  # of every name but the head's; files of the bare model leave it out
    ignored: str = r"(?!)"  # names (without prefix) that hold no weights, as a regular expression
    embedding: str = ""  # the name whose copy a file may also hold as ``head``, where they are tied
    head: str = "lm_head.weight"


def row(ours: str, theirs: str, transform: Transform = AS_IS) -> Row:
    return Row((ours,), (theirs,), transform)


def load_weights(family: Family, model: Decoder, tensors: Tensors) -> Params:
    """Their tensors as our float32 parameters: each tensor used once, each parameter filled, or UserError."""
    tensors = _canonical(family, model, tensors)
    shapes = _flatten(jax.eval_shape(model.init, jax.random.key(0)))
    params: dict[str, np.ndarray] = {}
    for entry in family.rows(model.config):
        if missing := [name for name in entry.theirs if name not in tensors]:
            raise UserError(f"tensor {missing[0]!r} is missing from the {family.model_type} weights")
        theirs = [tensors.pop(name) for name in entry.theirs]
        try:
            ours = entry.transform.load(theirs)
        except ValueError as error:
            raise UserError(f"tensor {entry.theirs[0]!r} of shape {theirs[0].shape}: {error}") from error
        for path, array in zip(entry.ours, ours, strict=True):
            if array.shape != shapes[path].shape:
                names = ", ".join(f"{n!r} {list(t.shape)}" for n, t in zip(entry.theirs, theirs, strict=True))
                raise UserError(
                    f"tensor {names} gives {path} the shape {list(array.shape)}, "
                    f"the config says {list(shapes[path].shape)}"
                )
            params[path] = np.ascontiguousarray(array, np.float32)
    if tensors:
        raise UserError(f"tensor {min(tensors)!r} has no place in a {family.model_type} model")
    assert params.keys() == shapes.keys(), (
        f"the {family.model_type} table misses {shapes.keys() - params.keys()}"
    )
    return _unflatten(params)


def dump_weights(family: Family, model: Decoder, params: Params) -> Tensors:
    """Our parameters as their tensors, contiguous float32."""
    flat = _flatten(params)
    expected = _flatten(jax.eval_shape(model.init, jax.random.key(0)))
    if wrong := sorted(flat.keys() ^ expected.keys()):
        raise UserError(
            f"parameter {wrong[0]!r} is {'missing' if wrong[0] in expected else 'not of this model'}"
        )
    tensors = {}
    for entry in family.rows(model.config):
        theirs = entry.transform.save([np.asarray(flat[path], np.float32) for path in entry.ours])
        for name, array in zip(entry.theirs, theirs, strict=True):
            full_name = name if name == family.head else family.prefix + name
            tensors[full_name] = np.ascontiguousarray(array)
    return tensors


def _canonical(family: Family, model: Decoder, tensors: Tensors) -> Tensors:
    """Names without prefix, without buffers, and without the copy of a tied embedding."""
    canonical: Tensors = {}
    for full_name, array in tensors.items():
        name = full_name.removeprefix(family.prefix)
        if re.fullmatch(family.ignored, name):
            continue
        if name in canonical:
            raise UserError(f"tensor {name!r} is there twice, with and without {family.prefix!r}")
        canonical[name] = array
    if model.config.tie_embeddings and {family.head, family.embedding} <= canonical.keys():
        head = canonical.pop(family.head)
        if not np.array_equal(head, canonical[family.embedding]):
            raise UserError(
                f"tensor {family.head!r} differs from {family.embedding!r}, but the config ties them"
            )
    return canonical


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def _unflatten(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def choose(names: Mapping[str, T], setting: str, value: Any) -> T:
    """Translates a value of their config; one that has no translation is a UserError."""
    if value not in names:
        raise UserError(f"{setting} must be one of {', '.join(names)}, got {value!r}")
    return names[value]


def require(config: Mapping[str, Any], **expected: Any) -> None:
    """Refuses a config that switches on what this family's reader does not implement."""
    for setting, wanted in expected.items():
        if (got := config.get(setting, wanted)) != wanted:
            raise UserError(f"{setting} must be {wanted}, got {got!r}: not supported")


def express(config: DecoderConfig, family: str, **expected: Any) -> None:
    """Refuses a decoder that a family cannot express."""
    for setting, wanted in expected.items():
        if (got := getattr(config, setting)) != wanted:
            raise UserError(f"{setting} must be {wanted!r} for a {family} export, got {got!r}")
