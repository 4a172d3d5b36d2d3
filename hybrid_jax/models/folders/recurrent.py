"""Recurrent language models out of Hugging Face folders and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.mamba2 import RECURRENT
from hybrid_jax.models.families.names import are_tied
from hybrid_jax.models.folders.family_folder import (
    GENERATION,
    Dtype,
    Shardings,
    content_like,
    family_of,
    read_config,
    read_params,
    token_ids,
    write_folder,
)
from hybrid_jax.models.folders.files import CONFIG, has_weights, open_weights, read_model_config
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.models.vocabulary import grown, vocabulary_of

log = logging.getLogger(__name__)


def is_recurrent(folder: Path) -> bool:
    """Tells whether a folder's config.json names a recurrent family."""
    return read_model_config(folder).get("model_type") in RECURRENT


def load_recurrent(
    folder: str | Path,
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> tuple[RecurrentModel, Params]:
    """Reads a folder; arguments as in `hf.load_pretrained`. The computation is in float32.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, left over or of the wrong shape.
    """
    family, model = _read_model(Path(folder))
    read = read_params(
        Path(folder), family, model, dtype=param_dtype, sharding=sharding, check_finite=check_finite
    )
    return model, read


def _read_model(folder: Path) -> tuple[Family, RecurrentModel]:
    family, config, _ = read_config(folder, RECURRENT)
    if config.tie_embeddings and has_weights(folder) and not are_tied(family, dict(open_weights(folder)[1])):
        log.warning("%s: the head differs from the embedding, so both are kept", folder)
        config = replace(config, tie_embeddings=False)
    return family, RecurrentModel(config)


def save_recurrent(
    folder: str | Path,
    model: RecurrentModel,
    params: Params,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `transformers` loads; arguments as in `hf.save_pretrained`.

    Raises:
        UserError: no family can express the model, or a parameter is not finite.
    """
    family = _family_of(model)
    if family is None:
        raise UserError(f"a model of {type(model.config).__name__} settings has no Hugging Face format")
    like = getattr(model, "folder", None)
    model = RecurrentModel(model.config)  # whose parameters have shapes without a folder being read
    content = content_like(like, CONFIG, family.model_type)
    _, config = family_of(model.config, {family.model_type: family}, content)
    ids = token_ids(content, eos_ids, pad_id)
    header = {"architectures": [family.architecture], "dtype": dtype}
    generation = {"_from_model_config": True, **content_like(like, GENERATION, family.model_type), **ids}
    contents = {CONFIG: {**config, **header, **ids}, GENERATION: generation}
    write_folder(Path(folder), family, model, params, contents, dtype=dtype, max_shard_bytes=max_shard_bytes)


def has_recurrent_format(model: RecurrentModel) -> bool:
    """Tells whether a family can express the model."""
    family = _family_of(model)
    try:
        return family is not None and bool(family_of(model.config, {family.model_type: family}))
    except UserError:
        return False


def _family_of(model: RecurrentModel) -> Family | None:
    return next((family for family in RECURRENT.values() if type(model.config) is family.config), None)


@dataclass(frozen=True)
class LoadedRecurrent(RecurrentModel):
    """A recurrent model whose `init` reads its folder: the key is not used. Call it outside `jax.jit`."""

    folder: str
    check_finite: bool = False

    def init(self, key) -> Params:
        """Reads the weights; ``key`` is not used."""
        return grown(load_recurrent(self.folder, check_finite=self.check_finite)[1], self.vocab_size)


def loaded_recurrent(
    folder: Path, path: str, vocab_size: int | None, *, resize: bool, check_finite: bool, dropout: float | None
) -> LoadedRecurrent:
    """The model of a folder for a tokenizer of ``vocab_size`` tokens.

    Args:
        folder: of the model.
        path: what the user calls it, for messages.
        vocab_size: of the tokenizer, if there is one.
        resize: give it rows for more tokens than it has.
        check_finite: refuse weights with NaN or infinity.
        dropout: of training.
    """
    config = _read_model(folder)[1].config
    size = vocabulary_of(config.vocab_size or 0, vocab_size, path, resize=resize)
    return LoadedRecurrent(replace(config, vocab_size=size, dropout=dropout or 0.0), str(folder), check_finite)
