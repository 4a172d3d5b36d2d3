"""Scorers in folders: those of Hugging Face, and those that only we know.

Ours have a config.json whose ``model_type`` begins with ``hybrid_jax_`` and whose ``settings`` are those of the
scorer, and a model.safetensors with the parameters under their own paths. What a scorer needs beside (the scale
of a reward, the temperature of probabilities) lies in extra.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import suggest
from hybrid_jax.models.base import Params
from hybrid_jax.models.classifier import (
    Classifier,
    PretrainedClassifier,
    architecture_of,
    load_classifier,
    merged,
    save_classifier,
)
from hybrid_jax.models.encoder_scorer import HEAD, EncoderClassifier, EncoderScorer, find_separator
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.encoders import ENCODERS
from hybrid_jax.models.families.family import flatten, parameter_shapes, unflatten
from hybrid_jax.models.folders.encoder import load_encoder, save_encoder
from hybrid_jax.models.folders.family_folder import family_of, placement
from hybrid_jax.models.folders.files import CONFIG, is_finite, open_weights, read_json, write_json, write_model
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.ngram_scorer import NGramScorer
from hybrid_jax.models.scorer import SequenceScorer, head_of, with_head
from hybrid_jax.parallel import hosts
from hybrid_jax.parallel.mesh import whole_array

log = logging.getLogger(__name__)

EXTRA = "extra.json"
_OURS: dict[str, type] = {
    "hybrid_jax_ngrams": NGramScorer,
    "hybrid_jax_encoder": EncoderScorer,
    "hybrid_jax_classifier": Classifier,
}
_SHARD_BYTES = 5e9


def load_scorer(
    folder: str | Path, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[SequenceScorer, Params]:
    """Reads a scorer; its ``config.json`` decides the kind.

    Args:
        folder: a ``*ForSequenceClassification`` of a decoder or an encoder family, or what `save_scorer` wrote;
            or the id of such a model on the hub.
        dtype: of the computation, where the kind has a choice.

    Raises:
        UserError: it holds no scorer, or is damaged: a parameter is missing, left over or of the wrong shape.
    """
    folder = find_folder(folder)
    kind = str(read_json(folder / CONFIG).get("model_type"))
    if kind in _OURS:
        return _load_ours(folder, _OURS[kind], dtype)
    if kind in FAMILIES:
        return load_classifier(folder, dtype)
    if kind not in ENCODERS:
        known = suggest(kind, [*_OURS, *FAMILIES, *ENCODERS])
        raise UserError(f"{folder}: unknown model_type {kind!r}; {known}")
    encoder, params = load_encoder(folder, dtype)
    if encoder.config.head != "sequence":
        raise UserError(
            f"{folder} holds an encoder without a head for texts: train one with the model 'encoder'"
        )
    return EncoderClassifier(encoder, find_separator(folder)), params


def save_scorer(
    folder: str | Path,
    scorer: SequenceScorer,
    params: Params,
    tokenizer_save: Callable[[Path], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load_scorer` reads; an earlier scorer in it is replaced.

    A `Classifier` is written as `transformers` knows it where a family can express it, as ours where none can;
    adapters are merged into the maps that they change.

    Args:
        folder: to write.
        scorer: one of this package.
        params: all finite.
        tokenizer_save: writes the scorer's tokenizer into the folder (`Tokenizer.save`).
        extra: what `read_extra` gives back: JSON.

    Raises:
        UserError: a parameter is not finite, or not of the scorer.
    """
    folder = Path(folder)
    if hosts.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # until all is there, the folder is none
        (folder / EXTRA).unlink(missing_ok=True)
        if tokenizer_save is not None:
            tokenizer_save(folder)
        if extra:
            write_json(folder / EXTRA, extra)
    if isinstance(scorer, EncoderClassifier):
        save_encoder(folder, scorer.encoder, params)
    elif isinstance(scorer, Classifier):
        _save_classifier(folder, scorer, params)
    elif isinstance(scorer, EncoderScorer):
        _save_ours(folder, *_thawed(scorer, params))
    elif isinstance(scorer, NGramScorer):
        _save_ours(folder, scorer, params)
    else:
        raise UserError(f"a scorer of the kind {type(scorer).__name__} cannot be saved")


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What was saved beside a scorer; nothing for a folder of others."""
    path = Path(folder) / EXTRA
    return read_json(path) if path.is_file() else {}


def _save_classifier(folder: Path, scorer: Classifier, params: Params) -> None:
    start = scorer.start.folder if isinstance(scorer, PretrainedClassifier) else None
    scorer, params = merged(scorer, params)
    try:
        architecture_of(family_of(scorer.config, FAMILIES)[0].model_type)
    except UserError as error:
        log.info("transformers has no class for this classifier, it is written for hybrid_jax alone: %s", error)
        _save_ours(folder, scorer, params)
        return
    save_classifier(folder, scorer, params, like=start)


def _thawed(scorer: EncoderScorer, params: Params) -> tuple[EncoderScorer, Params]:
    """The same without the folder that it came from; its head lies beside the body."""
    settings = {field.name: getattr(scorer, field.name) for field in fields(EncoderScorer)}
    return replace(EncoderScorer(**settings), frozen=False), with_head(*head_of(params, HEAD))


def _save_ours(folder: Path, scorer: Any, params: Params) -> None:
    kind = next(name for name, known in _OURS.items() if type(scorer) is known)
    flat, shapes = flatten(params), parameter_shapes(scorer)
    if wrong := sorted(flat.keys() ^ shapes.keys()):
        raise UserError(
            f"parameter {wrong[0]!r} is {'missing' if wrong[0] in shapes else 'not of this scorer'}"
        )

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in sorted(flat.items()):
            array = np.ascontiguousarray(whole_array(leaf), np.float32)
            if not is_finite(array):
                raise UserError(f"parameter {path!r} holds NaN or infinity, so the scorer is not exported")
            yield path, array

    if hosts.is_first():
        content = {"model_type": kind, "settings": to_dict(scorer)}
        write_model(folder, tensors(), {CONFIG: content}, _SHARD_BYTES)
    else:
        for _ in tensors():  # each is gathered from all processes, and written by one
            pass


def _load_ours(folder: Path, cls: type, dtype: Literal["float32", "bfloat16"]) -> tuple[Any, Params]:
    settings = read_json(folder / CONFIG).get("settings")
    try:
        scorer = parse(cls, settings, "settings")
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    if hasattr(scorer.config, "dtype"):
        scorer = replace(scorer, config=replace(scorer.config, dtype=dtype))
    file, tensors = open_weights(folder)
    shapes, place = parameter_shapes(scorer), placement("float32")
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise UserError(f"{file}: parameter {missing[0]!r} is missing")
    if left := sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{file}: parameter {left[0]!r} has no place in this scorer")
    flat = {}
    for path, shape in shapes.items():
        array = tensors[path]()
        if array.shape != shape.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            got = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{file}: parameter {path!r} must be float {list(shape.shape)}, got {got}")
        flat[path] = place(path, array)
    return scorer, unflatten(flat)
