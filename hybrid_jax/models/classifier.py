"""Decoders with a score in place of the next token: ``*ForSequenceClassification`` (reward models, critics).

logits[b] = hidden[b, last real token of b] · W (+ bias)       float32, [B Y]

`transformers` knows no bias here. Ours, that of a value head, is a list in config.json, ``score_bias``, which
`transformers` carries along unused: its logits are ours less the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Parameters
from hybrid_jax.models.base import Params
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
from hybrid_jax.models.folders.hf import CLASSIFIER
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.heads import ClassificationHead, RegressionHead, TextHead
from hybrid_jax.models.layers import linear
from hybrid_jax.models.lora import merge
from hybrid_jax.models.scorer import LastState, TextScorer, at_last_token

_BIAS = "score_bias"


@dataclass(frozen=True)
class Classifier:
    """A decoder and a linear map of the hidden state that has read all of a text: a `SequenceScorer`.

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
        """Y, numbers a text."""
        return len(self.labels)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        return self.backbone.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that it can read; None has no bound."""
        return self.config.max_length

    def init(self, key: Array) -> Params:
        """Random parameters: the backbone's, and ``score``: kernel [D Y], bias [Y] where there is one."""
        width = self.config.embedding_width or self.config.width
        noise = jax.random.normal(jax.random.fold_in(key, Parameters.HEADS), (width, self.num_labels))
        kernel = self.config.init_std * noise
        score = {"kernel": kernel, **({"bias": jnp.zeros(self.num_labels)} if self.has_bias else {})}
        return {**self.backbone.init(key), "score": score}

    def cast(self, params: Params) -> Params:
        """The backbone's as it casts them; the map stays as it is."""
        body = {name: part for name, part in params.items() if name != "score"}
        return {**self.backbone.cast(body), "score": params["score"]}

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """Logits, float32, read at the last real token of each row, wherever its padding is."""
        body, score = {n: part for n, part in params.items() if n != "score"}, params["score"]
        if attention_mask is None:
            attention_mask = jnp.ones(tokens.shape, bool)
        hidden = self.backbone.hidden(body, tokens, attention_mask, dropout_key=dropout_key)
        read = at_last_token(body, hidden, attention_mask)
        return linear(read.astype(jnp.float32), score["kernel"].astype(jnp.float32), score.get("bias"))


def as_classifier(scorer: TextScorer, params: Params) -> tuple[Classifier, Params] | None:
    """A decoder with a linear head as a `Classifier`, the same logits; None for others.

    Adapters are merged, and layers are in a list: what folders know.
    """
    trunk, head = scorer.trunk, scorer.head
    if (
        not isinstance(trunk, LastState)
        or not isinstance(trunk.model, Decoder)
        or not isinstance(head, TextHead)
    ):
        return None
    if head.hidden_width is not None:
        return None
    decoder, score = trunk.model, params["head"]["score"]
    body = merge(decoder.config.lora, decoder.listed(params["trunk"]))
    config = replace(decoder.as_list().config, lora=None)
    regression = isinstance(head, RegressionHead)
    kind = "regression" if regression else "single_label_classification"
    kept = {name: part for name, part in body.items() if name != "lm_head"}
    return Classifier(config, head.labels, kind, head.bias), {**kept, "score": score}


def as_text_scorer(classifier: Classifier, params: Params) -> tuple[TextScorer, Params]:
    """The inverse of `as_classifier`."""
    regression = classifier.problem_type == "regression" or classifier.num_labels == 1
    kind = RegressionHead if regression else ClassificationHead
    head = kind(labels=classifier.labels, bias=classifier.has_bias)
    trunk = {name: part for name, part in params.items() if name != "score"}
    scorer = TextScorer(LastState(classifier.backbone), head)
    return scorer, {"trunk": trunk, "head": {"score": params["score"]}}


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
