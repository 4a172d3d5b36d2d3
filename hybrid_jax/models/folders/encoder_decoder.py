"""Encoder-decoders out of Hugging Face folders and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Rate, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.families.family import Family, load_weights
from hybrid_jax.models.families.names import Tensors
from hybrid_jax.models.families.t5 import ENCODER_DECODERS
from hybrid_jax.models.folders.family_folder import (
    GENERATION,
    Dtype,
    Shardings,
    family_of,
    placement,
    read_config,
    write_folder,
)
from hybrid_jax.models.folders.files import CONFIG, open_weights
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.vocabulary import grown, vocabulary_of

_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding, in old files


def load_encoder_decoder(
    folder: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> tuple[EncoderDecoder, Params]:
    """Reads a T5 folder; arguments as in `hf.load_pretrained`.

    The model has a head of its own where the weights hold one that differs from the embedding: this decides,
    as it does in `transformers` 5, not ``tie_word_embeddings``.

    Raises:
        UserError: the family is unknown, a file is missing or damaged, a tensor is missing, left over or of the
            wrong shape.
    """
    folder = find_folder(folder)
    model, family, file, tensors = _open(folder, dtype, check_finite)
    return model, load_weights(family, model, tensors, placement(param_dtype, sharding), str(file))


def _open(folder: Path, dtype, check_finite: bool) -> tuple[EncoderDecoder, Family, Path, Tensors]:
    family, config, _ = read_config(folder, ENCODER_DECODERS)
    file, stored = open_weights(folder, check_finite)
    tensors: Tensors = dict(stored)
    for name in (*_COPIES, family.head):
        if family.embedding not in tensors and name in tensors:  # a file may hold one of the copies alone
            tensors[family.embedding] = tensors[name]
    for name in _COPIES:
        if name in tensors and not _same(tensors, name, family.embedding):
            raise UserError(f"{file}: tensor {name!r} differs from {family.embedding!r}: not supported")
        tensors.pop(name, None)
    tied = family.head not in tensors or _same(tensors, family.head, family.embedding)
    return EncoderDecoder(replace(config, dtype=dtype, tie_embeddings=tied)), family, file, tensors


def _same(tensors: Tensors, name: str, other: str) -> bool:
    return other in tensors and np.array_equal(tensors[name](), tensors[other]())


def save_encoder_decoder(
    folder: str | Path,
    model: EncoderDecoder,
    params: Params,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `transformers` loads with ``AutoModelForSeq2SeqLM``; arguments as in `hf`.

    Raises:
        UserError: no family can express the model, or a parameter is not finite.
    """
    model = EncoderDecoder(model.config)  # whose parameters have shapes without a folder being read
    c = model.config
    family, config = family_of(c, ENCODER_DECODERS)
    eos = list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None)
    ids = {"eos_token_id": eos, "pad_token_id": pad_id, "decoder_start_token_id": c.start_id}
    # Before version 5, untied meant two things at once: a head of its own and scores that are not scaled.
    header = {"tie_word_embeddings": c.tie_embeddings or c.scale_outputs, "dtype": dtype}
    header["architectures"] = [family.architecture]
    contents = {CONFIG: {**config, **header, **ids}, GENERATION: {"_from_model_config": True, **ids}}
    write_folder(Path(folder), family, model, params, contents, dtype=dtype, max_shard_bytes=max_shard_bytes)


@BACKBONES.register("pretrained_encoder_decoder")
@settings
class PretrainedEncoderDecoder:
    """A backbone that starts from a T5 folder, or from a model on the hub.

    Attributes:
        path: of the folder, or an id: ``org/name``, ``org/name@revision``.
        dtype: of the computation; parameters are float32.
        dropout: None keeps the folder's.
        check_finite: refuse weights with NaN or infinity.
        resize_vocabulary: as of `hf.Pretrained`.
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    dropout: Rate | None = None
    check_finite: bool = False
    resize_vocabulary: bool = False

    def build(self, vocab_size: int | None = None) -> LoadedEncoderDecoder:
        """The model of the folder, whose `init` reads the weights.

        Raises:
            UserError: the folder cannot be read, or the tokenizer is larger than the model.
        """
        folder = find_folder(self.path)
        config = _open(folder, self.dtype, check_finite=False)[0].config
        config = replace(config, dropout=config.dropout if self.dropout is None else self.dropout)
        size = vocabulary_of(config.vocab_size or 0, vocab_size, self.path, resize=self.resize_vocabulary)
        config = replace(config, vocab_size=size)
        return LoadedEncoderDecoder(config, str(folder), self.check_finite)


@dataclass(frozen=True)
class LoadedEncoderDecoder(EncoderDecoder):
    """An encoder-decoder whose `init` reads its folder: the key is not used. Call it outside `jax.jit`."""

    folder: str
    check_finite: bool = False

    def init(self, key) -> Params:
        """Reads the weights; ``key`` is not used."""
        return grown(load_encoder_decoder(self.folder, check_finite=self.check_finite)[1], self.vocab_size)
