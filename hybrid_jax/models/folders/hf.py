"""Hugging Face folders of decoders in and out: config.json, weights, generation_config.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.ranges import Rate, settings
from hybrid_jax.models.base import BACKBONES, LanguageModel, Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.decoder_config import ComputeDtype
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import Family
from hybrid_jax.models.families.names import are_tied
from hybrid_jax.models.folders.encoder_decoder import LoadedEncoderDecoder
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
from hybrid_jax.models.folders.files import CONFIG, has_weights, open_weights, read_json, read_model_config
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.ours import MODEL_TYPE
from hybrid_jax.models.folders.peft import ADAPTER_CONFIG, adapted_config, read_adapter
from hybrid_jax.models.folders.recurrent import LoadedRecurrent, is_recurrent, loaded_recurrent
from hybrid_jax.models.lora import ADAPTER, Lora, add_adapter, merge
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.models.vocabulary import grown, vocabulary_of
from hybrid_jax.parallel.rules import current_placement

log = logging.getLogger(__name__)

_OTHER_HEADS = ("ForTokenClassification", "ForQuestionAnswering")  # of which the trunk is read
_HEADS_LEFT_OUT = ("score", "classifier", "qa_outputs")  # first parts of their tensors' names
CLASSIFIER = "ForSequenceClassification"  # how the architectures with such a head end


def load_pretrained(
    folder: str | Path,
    dtype: ComputeDtype = "float32",
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> tuple[Decoder, Params]:
    """Reads a Hugging Face folder; its ``config.json`` decides the family.

    Args:
        folder: Holds config.json and model.safetensors (or shards with their index, or pytorch_model.bin); or
            the id of a model on the hub, see `hub.find_folder`.
        dtype: Of the computation.
        param_dtype: Of the parameters.
        sharding: Where the parameters lie: one for all, or by path and shape. None is the default device.
        check_finite: Refuse weights with NaN or infinity.

    Raises:
        UserError: The family is unknown, a file is missing or damaged, a tensor is missing, left over, there
            twice or of the wrong shape.
    """
    folder = find_folder(folder)
    family, model = _read_model(folder, dtype)
    read = read_params(folder, family, model, dtype=param_dtype, sharding=sharding, check_finite=check_finite)
    return model, read


def save_pretrained(
    folder: str | Path,
    model: Decoder,
    params: Params,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
    like: str | Path | None = None,
) -> None:
    """Writes a folder that `transformers` loads; it is there as a whole or not at all.

    Args:
        folder: An earlier model in it is replaced.
        model: Written as the family that ``config.family`` names, else as the first that can express it.
        params: Of the model, all finite; adapters are merged into the maps that they change.
        eos_ids: Tokens that end a response; none keeps those of ``like``.
        pad_id: Token of padding; None keeps that of ``like``.
        dtype: Of the weights in the file.
        max_shard_bytes: Of one file of weights; more become several, with an index. One is in memory at a time.
        like: A folder whose other settings, those that we do not know, survive; by default the one that the
            model came from (`Pretrained`).

    Raises:
        UserError: No family can express the decoder, or a parameter is not finite.
    """
    like = getattr(model, "folder", None) if like is None else like
    params = merge(model.config.lora, model.listed(params))
    model = Decoder(
        replace(model.as_list().config, lora=None)
    )  # whose shapes are known without reading a folder
    content = content_like(like, CONFIG, model.config.family)
    family, config = family_of(model.config, FAMILIES, content)
    ids = token_ids(content, eos_ids, pad_id)
    header = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    generation = {"_from_model_config": True, **content_like(like, GENERATION, model.config.family), **ids}
    contents = {CONFIG: {**config, **header, **ids}, GENERATION: generation}
    write_folder(Path(folder), family, model, params, contents, dtype=dtype, max_shard_bytes=max_shard_bytes)


def load_adapted(folder: str | Path) -> tuple[PretrainedDecoder, Params]:
    """Reads an adapter of `peft` and the base that its adapter_config.json names.

    Raises:
        UserError: it names none, or one of the two cannot be read.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not (base := read_json(file).get("base_model_name_or_path")):
        raise UserError(f"{file}: base_model_name_or_path must name the adapter's base, got {base!r}")
    model = Pretrained(str(base), lora=Lora(path=str(folder))).build()
    assert isinstance(model, PretrainedDecoder)  # a recurrent model refuses adapters
    return model, model.init(root_key(0, Purpose.MODEL))  # draws nothing: the adapters are read


def abstract_params(model: LanguageModel) -> Params:
    """Shapes and dtypes of a model's parameters; nothing is read or made."""
    if isinstance(model, LoadedEncoderDecoder):
        model = EncoderDecoder(model.config)
    if isinstance(model, LoadedRecurrent):
        model = RecurrentModel(model.config)
    if not isinstance(model, PretrainedDecoder):
        return jax.eval_shape(model.init, jax.random.key(0))
    base = jax.eval_shape(Decoder(replace(model.as_list().config, lora=None)).init, jax.random.key(0))
    return jax.eval_shape(
        lambda base, key: model.arranged(model.with_adapter(base, key)), base, jax.random.key(0)
    )


@BACKBONES.register("pretrained")
@settings
class Pretrained:
    """A backbone that starts from a Hugging Face folder, or from a model on the hub.

    Attributes:
        path: Of the folder, or an id: ``org/name``, ``org/name@revision``.
        dtype: Of the computation; parameters are float32.
        dropout: None keeps the folder's.
        check_finite: Refuse weights with NaN or infinity.
        resize_vocabulary: Where the tokenizer has more tokens than the model has rows, give those rows: each
            the mean of the others, in the embedding and in the head.
        lora: Adapters that train in place of the parameters; ``{path: ...}`` starts from those of a folder.
        execution: How the model is computed.
    """

    path: str
    dtype: ComputeDtype = "float32"
    dropout: Rate | None = None
    check_finite: bool = False
    resize_vocabulary: bool = False
    lora: Lora | None = None
    execution: Execution = Execution()

    def build(self, vocab_size: int | None = None) -> PretrainedDecoder | LoadedRecurrent:
        """The model of the folder, whose `init` reads the weights.

        Raises:
            UserError: the folder cannot be read, or the tokenizer is larger than the model.
        """
        folder = find_folder(self.path)
        if read_model_config(folder).get("model_type") == MODEL_TYPE:
            raise UserError(
                f"{self.path} is a folder of hybrid_jax, which generate --model, references and rewards read; "
                "a run goes on from another run with start_from: RUN"
            )
        if is_recurrent(folder):
            return self._recurrent(folder, vocab_size)
        model = _read_model(folder, self.dtype)[1]
        config = model.config
        if self.dropout is not None:
            config = replace(config, dropout=self.dropout)
        size = vocabulary_of(model.vocab_size, vocab_size, self.path, resize=self.resize_vocabulary)
        config = adapted_config(self.lora, replace(config, vocab_size=size))
        _warn_of_frozen_rows(config, model.vocab_size)
        config = replace(config, execution=self.execution)
        return PretrainedDecoder(config, str(folder), self.check_finite)

    def _recurrent(self, folder: Path, vocab_size: int | None) -> LoadedRecurrent:
        """The model of a recurrent family, which has no other types, adapters or ways to be computed."""
        for name, only in (("dtype", "float32"), ("lora", None), ("execution", Execution())):
            if (got := getattr(self, name)) != only:
                shown = "left out" if name == "execution" else "null" if only is None else only
                raise UserError(
                    f"model.{name} must be {shown} for the recurrent model of {self.path!r}, got {got}"
                )
        return loaded_recurrent(
            folder,
            self.path,
            vocab_size,
            resize=self.resize_vocabulary,
            check_finite=self.check_finite,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class PretrainedDecoder(Decoder):
    """A decoder whose `init` reads its folder; the key is for new adapters. Call it outside `jax.jit`."""

    folder: str
    check_finite: bool = False

    def init(self, key) -> Params:
        """Reads the weights; ``key`` draws new adapters."""
        params = load_pretrained(self.folder, check_finite=self.check_finite, sharding=_sharding())[1]
        return self.arranged(self.with_adapter(self.fitted(params), key))

    def fitted(self, params: Params) -> Params:
        """The folder's parameters with the rows of this vocabulary, and with the head of one that unties it."""
        params = grown(params, self.vocab_size)
        if self.config.tie_embeddings or "kernel" in params.get("lm_head", {}):
            return params
        head = jnp.copy(params["token_embedding"]["embedding"].T)
        return {**params, "lm_head": {**params.get("lm_head", {}), "kernel": head}}

    def with_adapter(self, params: Params, key: jax.Array) -> Params:
        """The base's ``params`` and the adapters to start from: those of a folder, or fresh ones."""
        lora = self.config.lora
        if lora is None or lora.path is None:
            return add_adapter(lora, params, key)
        resized = _read_model(Path(self.folder), "float32")[1].vocab_size != self.vocab_size
        return {**params, ADAPTER: read_adapter(lora, Decoder(self.as_list().config), params, resized=resized)}


def _sharding() -> Shardings | None:
    """The sharding of the parameters as they are read: each process reads only what its own devices keep."""
    if (placement := current_placement()) is None:
        return None
    return lambda path, shape: placement.sharding(shape, param_axes(path, shape))


def _warn_of_frozen_rows(config: DecoderConfig, old_size: int) -> None:
    """Says so where adapters leave the rows of new tokens at the mean that they begin with."""
    lora, count = config.lora, (config.vocab_size or 0) - old_size
    if lora is None or count <= 0:
        return
    tables = ["token_embedding"] if config.tie_embeddings else ["token_embedding", "lm_head"]
    all_rows = all(re.fullmatch(lora.train_fully or "", table) for table in tables)
    if not all_rows and not set(range(old_size, old_size + count)) <= set(lora.tokens):
        log.warning(
            "the %d new rows stay the mean of the others: lora.train_fully: %s trains them",
            count,
            "|".join(tables),
        )


def _read_model(folder: Path, dtype: ComputeDtype) -> tuple[Family, Decoder]:
    family, config, content = read_config(folder, FAMILIES)
    architecture = str(next(iter(content.get("architectures") or ()), ""))
    if architecture.endswith(CLASSIFIER):
        raise UserError(f"{folder} holds a classifier, not a language model: read it with load_classifier")
    if architecture.endswith(_OTHER_HEADS):
        log.warning("%s: only the trunk of the %s is read, its head is left out", folder, architecture)
        family = replace(family, ignored=rf"{family.ignored}|({'|'.join(_HEADS_LEFT_OUT)})\..*")
    config = replace(config, dtype=dtype)
    if config.tie_embeddings and has_weights(folder) and not are_tied(family, dict(open_weights(folder)[1])):
        log.warning(
            "%s: the head differs from the embedding, so both are kept though its config ties them", folder
        )
        try:
            config = replace(config, tie_embeddings=False)
        except ValueError as error:
            raise UserError(f"{folder}: {family.head!r} differs from {family.embedding!r}: {error}") from error
    return family, Decoder(config)
