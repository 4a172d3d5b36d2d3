"""Scorers of texts in folders: those of Hugging Face, and our own (`folders.ours`).

What a scorer needs beside (the scale of a reward, the temperature of probabilities) lies in extra.json.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import NOTHING, suggest
from hybrid_jax.models.base import Params
from hybrid_jax.models.classifier import (
    Classifier,
    architecture_of,
    as_classifier,
    as_text_scorer,
    load_classifier,
    save_classifier,
)
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.encoders import ENCODERS
from hybrid_jax.models.folders.encoder import load_encoder, save_encoder
from hybrid_jax.models.folders.family_folder import family_of
from hybrid_jax.models.folders.files import CONFIG, read_json, read_model_config, write_json
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.ours import MODEL_TYPE, load_ours, save_ours
from hybrid_jax.models.scorer import LastState, SequenceScorer, TextScorer
from hybrid_jax.models.text_encoder import EncoderClassifier, find_separator
from hybrid_jax.parallel import hosts

log = logging.getLogger(__name__)

EXTRA = "extra.json"


def load_scorer(
    folder: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    trust: Container[str] = NOTHING,
) -> tuple[SequenceScorer, Params]:
    """Reads a scorer; its ``config.json`` decides the kind.

    Args:
        folder: a ``*ForSequenceClassification`` of a decoder or an encoder family, or what `save_scorer` wrote;
            or the id of such a model on the hub.
        dtype: of the computation, where the kind has a choice.
        trust: names in one of our own folders that may run code.

    Raises:
        UserError: it holds no scorer, or is damaged: a parameter is missing, left over or of the wrong shape.
    """
    folder = find_folder(folder)
    kind = str(read_model_config(folder).get("model_type"))
    if kind == MODEL_TYPE:
        return _ours(folder, *load_ours(folder, dtype, trust))
    if kind in FAMILIES:
        return load_classifier(folder, dtype)
    if kind not in ENCODERS:
        known = suggest(kind, [MODEL_TYPE, *FAMILIES, *ENCODERS])
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
    component: Any = None,
) -> None:
    """Writes a folder that `load_scorer` reads; an earlier scorer in it is replaced.

    A decoder with a linear head is written as `transformers` knows it where a family can express it, all else
    as ours; adapters are merged into the maps that they change.

    Args:
        folder: to write.
        scorer: one of this package.
        params: all finite.
        tokenizer_save: writes the scorer's tokenizer into the folder (`Tokenizer.save`).
        extra: what `read_extra` gives back: JSON.
        component: the settings that build its trunk, for one that is not of this package.

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
    elif isinstance(scorer, Classifier | TextScorer):
        _save_trunk_and_head(folder, scorer, params, component)
    else:
        raise UserError(f"a scorer of the kind {type(scorer).__name__} cannot be saved")


def read_extra(folder: str | Path) -> dict[str, Any]:
    """The extra data that was saved beside a scorer; empty for a folder that others wrote."""
    path = Path(folder) / EXTRA
    return read_json(path) if path.is_file() else {}


def _save_trunk_and_head(folder: Path, scorer: Classifier | TextScorer, params: Params, component: Any) -> None:
    found = (scorer, params) if isinstance(scorer, Classifier) else as_classifier(scorer, params)
    if found is not None and _is_known(found[0]):
        like = getattr(scorer.trunk.model, "folder", None) if isinstance(scorer, TextScorer) else None
        return save_classifier(folder, *found, like=like)
    if isinstance(scorer, Classifier):
        scorer, params = as_text_scorer(scorer, params)
    save_ours(folder, scorer, params, component)


def _is_known(classifier: Classifier) -> bool:
    """Tells whether `transformers` has a class for it."""
    try:
        return bool(architecture_of(family_of(classifier.config, FAMILIES)[0].model_type))
    except UserError as error:
        log.info("transformers has no class for this model, it is written for hybrid_jax alone: %s", error)
        return False


def _ours(folder: Path, model: Any, params: Params) -> tuple[SequenceScorer, Params]:
    if not isinstance(model, TextScorer):
        raise UserError(f"{folder} holds a model without a head for texts")
    # As a `Classifier`, whichever of the two formats it was written in.
    return (as_classifier(model, params) if isinstance(model.trunk, LastState) else None) or (model, params)
