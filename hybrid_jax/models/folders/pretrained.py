"""Language models out of folders and back, whatever their kind: the folder, or the model, decides."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import NOTHING
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.decoder_config import ComputeDtype
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.t5 import ENCODER_DECODERS
from hybrid_jax.models.folders import hf
from hybrid_jax.models.folders.encoder_decoder import load_encoder_decoder, save_encoder_decoder
from hybrid_jax.models.folders.family_folder import Dtype, Shardings, family_of
from hybrid_jax.models.folders.files import read_model_config
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.ours import MODEL_TYPE, load_ours
from hybrid_jax.models.folders.recurrent import (
    has_recurrent_format,
    is_recurrent,
    load_recurrent,
    save_recurrent,
)
from hybrid_jax.models.recurrent.model import RecurrentModel


def has_format(model: LanguageModel) -> bool:
    """Tells whether Hugging Face has a format for a model; a family that its config names is trusted."""
    if isinstance(model, RecurrentModel):
        return has_recurrent_format(model)
    if not isinstance(model, Decoder):
        return isinstance(model, EncoderDecoder)
    config = replace(model.as_list().config, lora=None)
    try:
        return config.family is not None or bool(family_of(config, FAMILIES))
    except UserError:
        return False


def load_pretrained(
    folder: str | Path,
    dtype: ComputeDtype = "float32",
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
    trust: Container[str] = NOTHING,
) -> tuple[LanguageModel, Params]:
    """Reads the language model of a folder, of Hugging Face or ours; its ``config.json`` decides the kind.

        model, params = load_pretrained("gpt2-small")
        output = model.apply(params, tokens, attention_mask)  # logits float32 [B T V], hidden [B T D]

    Args:
        folder: of the model, or its id on the hub: ``org/name``, ``org/name@revision``.
        dtype: of the computation; logits are float32.
        param_dtype: of the parameters.
        sharding: where the parameters lie: one for all, or by path and shape; None is the default device.
        check_finite: refuses weights with NaN or infinity.
        trust: names in one of our own folders that may run code.

    Raises:
        Untrusted: the folder names code that is not in ``trust``.
        UserError: the family is unknown, a file is missing or damaged, or a tensor is missing, left over or of
            the wrong shape.
    """
    folder = find_folder(folder)
    kind = read_model_config(folder).get("model_type")
    if kind == MODEL_TYPE:
        model, params = load_ours(folder, dtype, trust)
        if not isinstance(model, LanguageModel):
            raise UserError(f"{folder} holds a {type(model).__name__}, which gives no answers")
        return model, params
    if is_recurrent(folder):
        if dtype != "float32":
            raise UserError(f"dtype must be float32 for a recurrent model, got {dtype}")
        return load_recurrent(folder, param_dtype=param_dtype, sharding=sharding, check_finite=check_finite)
    if kind not in ENCODER_DECODERS:
        return hf.load_pretrained(
            folder,
            dtype,
            param_dtype=param_dtype,
            sharding=sharding,
            check_finite=check_finite,
        )
    if dtype == "float16":
        raise UserError("dtype must be float32 or bfloat16 for an encoder-decoder, got float16")
    return load_encoder_decoder(
        folder,
        dtype,
        param_dtype=param_dtype,
        sharding=sharding,
        check_finite=check_finite,
    )


def save_pretrained(
    folder: str | Path,
    model: LanguageModel,
    params: Params,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that `transformers` loads; it is there as a whole or not at all.

    Args:
        folder: an earlier model in it is replaced.
        model: a decoder, a recurrent model or an encoder-decoder.
        params: of the model, all finite; adapters are merged into the maps that they change.
        eos_ids: tokens that end a response.
        pad_id: token of padding.
        dtype: of the weights in the file.
        max_shard_bytes: of one file of weights.

    Raises:
        UserError: no family can express the model, or a parameter is not finite.
    """
    settings: Any = {"eos_ids": eos_ids, "pad_id": pad_id, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    if isinstance(model, EncoderDecoder):
        save_encoder_decoder(folder, model, params, **settings)
    elif isinstance(model, RecurrentModel):
        save_recurrent(folder, model, params, **settings)
    elif isinstance(model, Decoder):
        hf.save_pretrained(folder, model, params, **settings)
    else:
        raise UserError(f"a model of type {type(model).__name__} has no Hugging Face format")
