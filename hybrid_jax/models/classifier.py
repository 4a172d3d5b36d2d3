"""Decoders with a score in place of the next token: ``*ForSequenceClassification`` (reward models, critics).

logits[b] = hidden[b, last real token of b] · W (+ bias)       float32, [B Y]

`transformers` knows no bias here. Ours, that of a value head, is a list in config.json, ``score_bias``, which
`transformers` carries along unused: its logits are ours less the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.folders.family_folder import (
    Dtype,
    Shardings,
    family_of,
    placement,
    read_config,
    read_params,
    write_folder,
)
from hybrid_jax.models.folders.files import CONFIG, is_finite, read_json
from hybrid_jax.models.folders.hf import CLASSIFIER, PretrainedDecoder
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.layers import linear
from hybrid_jax.models.lora import merge
from hybrid_jax.models.scorer import check_labels, head_of, with_head

_BIAS = "score_bias"


@dataclass(frozen=True)
class Classifier:
    """A decoder and a linear map of the hidden state that has read all of a text: a `SequenceScorer`.

    The map trains beside adapters, where the decoder has them (`scorer.with_head`).

    Attributes:
        config: of the decoder; its head is not there.
        labels: one a logit.
        problem_type: of `transformers`: regression, single_label_classification, multi_label_classification.
        has_bias: the map has one; see above.
    """

    config: DecoderConfig
    labels: tuple[str, ...] = ("LABEL_0",)
    problem_type: str | None = None
    has_bias: bool = False

    @property
    def backbone(self) -> Decoder:
        """The decoder without its head: tied, it has no parameters of its own for one."""
        return Decoder(replace(self.config, tie_embeddings=True, head_bias=False))

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def init(self, key: Array) -> Params:
        """Random parameters: the backbone's, and ``score``: kernel [D Y], bias [Y] where there is one."""
        return with_head(self.backbone.init(key), {"score": self.init_score(key)})

    def init_score(self, key: Array) -> Params:
        """Random parameters of the map."""
        width = self.config.embedding_width or self.config.width
        kernel = self.config.init_std * jax.random.normal(jax.random.fold_in(key, 1), (width, self.num_labels))
        return {"kernel": kernel, **({"bias": jnp.zeros(self.num_labels)} if self.has_bias else {})}

    def cast(self, params: Params) -> Params:
        """The backbone's as it casts them; the map stays as it is."""
        body, head = head_of(params, ("score",))
        return with_head(self.backbone.cast(body), head)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """Logits, float32, read at the last real token of each row, wherever its padding is."""
        body, head = head_of(params, ("score",))
        hidden = self.backbone.hidden(body, tokens, attention_mask, dropout_key=dropout_key)
        if attention_mask is None:
            read = hidden[:, -1]
        else:
            last = tokens.shape[1] - 1 - jnp.argmax(attention_mask[:, ::-1] > 0, axis=1)
            read = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        if self.config.embedding_width is not None:
            read = linear(read, body["embedding_out"]["kernel"].astype(read.dtype))
        score = head["score"]
        return linear(read.astype(jnp.float32), score["kernel"].astype(jnp.float32), score.get("bias"))


@BACKBONES.register("classifier")
@settings
class ClassifierSettings:
    """A `Classifier` to train, from a random or a pretrained decoder.

    Attributes:
        backbone: a decoder, or a pretrained one (of a language model's folder); adapters train with the map.
        labels: one a logit; one alone is a regression or a reward.
        has_bias: the map has one.
    """

    backbone: Annotated[Any, BACKBONES]
    labels: tuple[str, ...]
    has_bias: bool = True

    def __post_init__(self):
        check_labels(self.labels)

    def build(self, vocab_size: int | None = None) -> Classifier:
        decoder = self.backbone.build(vocab_size)
        if not isinstance(decoder, Decoder):
            raise UserError(
                f"model.backbone must be a decoder or a pretrained one, got {BACKBONES.name_of(self.backbone)}"
            )
        kind = "regression" if len(self.labels) == 1 else "single_label_classification"
        settings = (decoder.config, self.labels, kind, self.has_bias)
        if isinstance(decoder, PretrainedDecoder):
            return PretrainedClassifier(*settings, start=decoder)
        return Classifier(*settings)


@dataclass(frozen=True, kw_only=True)
class PretrainedClassifier(Classifier):
    """A classifier whose `init` reads a language model's folder. Call it outside `jax.jit`."""

    start: PretrainedDecoder

    def init(self, key: Array) -> Params:
        body = self.start.init(key)
        kept = {name: part for name, part in body.items() if name != "lm_head"}
        return with_head(kept, {"score": self.init_score(key)})

    def plain(self) -> Classifier:
        """The same without its folder."""
        return Classifier(self.config, self.labels, self.problem_type, self.has_bias)


def merged(classifier: Classifier, params: Params) -> tuple[Classifier, Params]:
    """The same logits without adapters and with layers in a list: what folders know."""
    plain = classifier.plain() if isinstance(classifier, PretrainedClassifier) else classifier
    body, head = head_of(params, ("score",))
    backbone = classifier.backbone
    body = merge(classifier.config.lora, backbone.listed(body))
    config = replace(plain.config, lora=None, execution=backbone.as_list().config.execution)
    return replace(plain, config=config), {**body, **head}


def load_classifier(
    folder: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    param_dtype: Dtype = "float32",
    sharding: Shardings | None = None,
    check_finite: bool = False,
) -> tuple[Classifier, Params]:
    """Reads a ``*ForSequenceClassification`` folder of a decoder family; arguments as in `hf.load_pretrained`.

    Raises:
        UserError: it is no such folder, or it is damaged.
    """
    folder = find_folder(folder)
    family, config, content = read_config(folder, FAMILIES)
    architecture = str(next(iter(content.get("architectures") or ()), "of unknown kind"))
    if not architecture.endswith(CLASSIFIER):
        raise UserError(
            f"{folder} holds a model {architecture}, not a classifier: read it with load_pretrained"
        )
    bare = Classifier(replace(config, dtype=dtype), _labels(folder, content), content.get("problem_type"))
    params = read_params(folder, family, bare, dtype=param_dtype, sharding=sharding, check_finite=check_finite)
    if (given := content.get(_BIAS)) is None:
        return bare, params
    bias = _bias(folder, given, bare.num_labels)
    params["score"] = {**params["score"], "bias": placement(param_dtype, sharding)("score/bias", bias)}
    return replace(bare, has_bias=True), params


def save_classifier(
    folder: str | Path,
    classifier: Classifier,
    params: Params,
    *,
    pad_id: int | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: float = 5e9,
    like: str | Path | None = None,
) -> None:
    """Writes a folder that `transformers` loads with ``AutoModelForSequenceClassification``.

    Args:
        folder, params, dtype, max_shard_bytes, like: as in `hf.save_pretrained`.
        classifier: of a family that `transformers` has such a class for.
        pad_id: the token of padding, without which `transformers` reads one row at a time; None keeps that of
            ``like``.

    Raises:
        UserError: there is no such class, no family can express the decoder, or a parameter is not finite.
    """
    classifier, params = merged(classifier, params)
    content = read_json(Path(like) / CONFIG) if like is not None else {}
    content.pop("quantization_config", None)  # what we write is not quantised
    family, config = family_of(classifier.config, FAMILIES, content)
    header: dict[str, Any] = {
        "architectures": [architecture_of(family.model_type)],
        "id2label": {str(i): label for i, label in enumerate(classifier.labels)},
        "label2id": {label: i for i, label in enumerate(classifier.labels)},
        "problem_type": classifier.problem_type,
        "pad_token_id": content.get("pad_token_id") if pad_id is None else pad_id,
        "dtype": dtype,
    }
    score = dict(params["score"])
    if (bias := score.pop("bias", None)) is not None:
        header[_BIAS] = np.asarray(bias, np.float32).tolist()  # exact: JSON holds float64
        if not is_finite(np.asarray(bias)):
            raise UserError("parameter 'score/bias' holds NaN or infinity, so the model is not exported")
    write_folder(
        Path(folder),
        family,
        replace(classifier, has_bias=False),
        {**params, "score": score},
        {CONFIG: {**{key: value for key, value in config.items() if key != _BIAS}, **header}},
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def architecture_of(model_type: str) -> str:
    """The name of `transformers`' class, such as LlamaForSequenceClassification."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    if model_type not in NAMES:
        raise UserError(f"transformers has no {CLASSIFIER} for {model_type}")
    return NAMES[model_type]


def _labels(folder: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Names by number: those of the file, or as many as it counts, or the two of `transformers`."""
    named = content.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(content.get("num_labels") or 2))
    numbers: Sequence[str] = [str(i) for i in range(len(named))]
    if sorted(map(str, named)) != sorted(numbers):
        raise UserError(f"{folder / CONFIG}: id2label must number the labels from 0, got {list(named)}")
    return tuple({str(i): str(label) for i, label in named.items()}[i] for i in numbers)


def _bias(folder: Path, given: Any, num_labels: int) -> np.ndarray:
    try:
        bias = np.array(given, np.float32)
    except (ValueError, TypeError):
        bias = np.empty(0)
    if bias.shape != (num_labels,):
        raise UserError(f"{folder / CONFIG}: {_BIAS} must be {num_labels} numbers, got {given!r}")
    return bias
