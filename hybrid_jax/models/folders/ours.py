"""Our own folders, for every model that Hugging Face has no format for: yours, too.

    config.json         {"model_type": "hybrid_jax", "vocab_size": V, "model": {…}, "head": {…} or null}
    model.safetensors   the parameters under their own paths

``model`` and ``head`` are settings as a config names them. A name with a colon runs code when it is read, so a
folder that has one is only read where the caller trusts that name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.registry import NOTHING
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families.family import flatten, parameter_shapes, unflatten
from hybrid_jax.models.folders.family_folder import Dtype
from hybrid_jax.models.folders.files import CONFIG, is_finite, open_weights, read_json, write_model
from hybrid_jax.models.heads import HEADS
from hybrid_jax.models.lora import merge
from hybrid_jax.models.scorer import LastState, TextScorer, text_trunk
from hybrid_jax.parallel import hosts
from hybrid_jax.parallel.mesh import whole_array

MODEL_TYPE = "hybrid_jax"
_SHARD_BYTES = 5e9


@dataclass(frozen=True)
class _Settings:
    """The entries of config.json beside the kind."""

    vocab_size: int | None
    model: Annotated[Any, BACKBONES]
    head: Annotated[Any, HEADS] | None = None


def check_has_format(component: Any, registry: Any = BACKBONES) -> None:
    """Checks that a folder can name the settings of a model or a head.

    Raises:
        UserError: they are of a class that another process could not find.
    """
    name = registry.name_of(component)
    if name.startswith("__main__:") or "<" in name:
        raise UserError(
            f"{registry.kind} {name!r} lives only in this program: move it to a module, else no folder holds it"
        )


def save_ours(
    folder: Path, model: Any, params: Params, component: Any = None, dtype: Dtype = "float32"
) -> None:
    """Writes a model; adapters are merged into the maps that they change.

    Args:
        folder: an earlier model in it is replaced.
        model: a language model, a trunk for texts or a `TextScorer`.
        params: of the model, all finite.
        component: the settings that build it, for one that is not of this package.
        dtype: of floating numbers in the file.

    Raises:
        UserError: a parameter is not the model's or not finite, or no settings can build the model again.
    """
    model, params = _plain(model, params)
    trunk, head = (model.trunk, model.head) if isinstance(model, TextScorer) else (model, None)
    settings = _component_of(trunk, component)
    for found, registry in ((settings, BACKBONES), (head, HEADS)):
        if found is not None:
            check_has_format(found, registry)
    content = to_dict(_Settings(trunk.vocab_size, settings, head))
    again = settings.build(trunk.vocab_size)  # without the folder that it may have come from
    again = again if head is None else TextScorer(text_trunk(again), head)
    flat, shapes = flatten(params), parameter_shapes(again)
    if wrong := sorted(flat.keys() ^ shapes.keys()):
        raise UserError(f"parameter {wrong[0]!r} is {'missing' if wrong[0] in shapes else 'not of this model'}")

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in sorted(flat.items()):
            array = np.ascontiguousarray(whole_array(leaf))
            if jax.numpy.issubdtype(array.dtype, np.floating):
                array = array.astype(jax.numpy.dtype(dtype))
            if not is_finite(array):
                raise UserError(f"parameter {path!r} holds NaN or infinity, so the model is not exported")
            yield path, array

    if hosts.is_first():
        write_model(folder, tensors(), {CONFIG: {"model_type": MODEL_TYPE, **content}}, _SHARD_BYTES)
    else:
        for _ in tensors():  # each is gathered from all processes, and written by one
            pass


def load_ours(folder: Path, dtype: str | None = None, trust: Container[str] = NOTHING) -> tuple[Any, Params]:
    """Reads what `save_ours` wrote: a language model, a trunk or a `TextScorer`, with its parameters.

    Args:
        folder: to read.
        dtype: of the computation, where the model has a choice; None keeps the folder's.
        trust: names in its settings that may run code.

    Raises:
        Untrusted: its settings name code that is not in ``trust``.
        UserError: it is damaged: a parameter is missing, left over or of the wrong shape.
    """
    model = model_of_ours(folder, dtype, trust)
    return model, _read(folder, model)


def model_of_ours(folder: Path, dtype: str | None = None, trust: Container[str] = NOTHING) -> Any:
    """`load_ours` without the parameters."""
    content = {name: value for name, value in read_json(folder / CONFIG).items() if name != "model_type"}
    try:
        settings = parse(_Settings, content, trust=trust)
    except Untrusted as error:
        raise Untrusted(
            f"{folder / CONFIG}: {error}; if you trust this folder, give --trust, or --config with the "
            "file that names that code, to a command that takes them; a reward reads no such folder"
        ) from error
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    component = settings.model
    if dtype is not None and hasattr(component, "dtype"):
        component = replace(component, dtype=dtype)
    model: Any = component.build(settings.vocab_size)
    if settings.head is not None:
        model = TextScorer(text_trunk(model), settings.head)
    return model


def _read(folder: Path, model: Any) -> Params:
    file, tensors = open_weights(folder)
    shapes, flat = parameter_shapes(model), {}
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file}: parameter {missing[0]!r} is missing")
    if left := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{file}: parameter {left[0]!r} has no place in this model")
    for path, shape in shapes.items():
        array = tensors[path]()
        kinds = [jax.numpy.issubdtype(dtype, np.floating) for dtype in (array.dtype, shape.dtype)]
        if array.shape != shape.shape or kinds[0] != kinds[1]:
            kind = "float" if kinds[1] else str(shape.dtype)
            got = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{file}: parameter {path!r} must be {kind} {list(shape.shape)}, got {got}")
        flat[path] = jax.device_put(array.astype(shape.dtype))
    return unflatten(flat)


def _plain(model: Any, params: Params) -> tuple[Any, Params]:
    """The same numbers without adapters and with layers in a list."""
    if isinstance(model, TextScorer):
        if not isinstance(model.trunk, LastState):
            return model, params
        trunk, below = _plain(model.trunk.model, params["trunk"])
        return replace(model, trunk=LastState(trunk)), {**params, "trunk": below}
    if not isinstance(model, Decoder):
        return model, params
    listed = merge(model.config.lora, model.listed(params))
    return Decoder(replace(model.as_list().config, lora=None)), listed


def _component_of(trunk: Any, given: Any) -> Any:
    """The settings that build a trunk again, without any folder."""
    trunk = trunk.model if isinstance(trunk, LastState) else trunk
    if isinstance(trunk, Decoder):
        return trunk.config
    found = getattr(trunk, "settings", given)
    if found is None:
        raise UserError(f"nothing says how to build a {type(trunk).__name__} again, so no folder can hold it")
    return found
