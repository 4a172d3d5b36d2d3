"""Encoders that give a vector for a text, or for a text and what it answers.

    u = pool(encoder(text))                             one text, or both read as one ("joint")
    u = [q; a; q ∘ a; |q − a|]                          "features" of the two embeddings (InferSent, Conneau et
                                                        al. 2017; COMET's estimator, Rei et al. 2020)

A row is ``[CLS] text [SEP]`` or ``[CLS] prompt [SEP] text [SEP]`` (`data.scored_text`): the first separator
tells where the prompt ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import MOST_TOKENIZER, read_json
from hybrid_jax.core.ranges import Count, Natural, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.folders.encoder import load_encoder
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.pooling import Mode, Pooling

Pair = Literal["none", "joint", "features"]


@dataclass(frozen=True)
class TextEncoder:
    """A `TextTrunk`: an encoder's body, pooled.

    Attributes:
        config: of the body; it has neither pooler nor head of its own.
        pooling: of the hidden states.
        pair: how a prompt is read beside the text; see above.
        separator_id: the token between the two; only a trunk for single texts needs none.
    """

    config: EncoderConfig
    pooling: Pooling = Pooling(normalize=False)
    pair: Pair = "none"
    separator_id: int | None = None

    @property
    def settings(self) -> TextEncoderConfig:
        """The settings that build it, without the folder that it came from."""
        return TextEncoderConfig(
            encoder=self.config,
            pooling=self.pooling.mode,
            normalize=self.pooling.normalize,
            pair=self.pair,
            separator_id=self.separator_id,
            max_length=self.pooling.max_length,
            dtype=self.config.dtype,
        )

    @property
    def body(self) -> Encoder:
        """The encoder that reads a text."""
        return Encoder(self.config)

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that it can read; None has no bound."""
        return min(self.config.max_length, self.pooling.max_length or self.config.max_length)

    @property
    def num_features(self) -> int:
        """F, numbers a text."""
        return self.config.width * (4 if self.pair == "features" else 1)

    def init(self, key: Array) -> Params:
        """Random parameters."""
        return self.body.init(key)

    def cast(self, params: Params) -> Params:
        """The same: the layers cast where they compute."""
        return params

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B F"]:
        """The embedding of each text, or what compares those of a prompt and its answer."""
        embed = partial(self._embed, params, dropout_key=dropout_key)
        mask = attention_mask.astype(bool)
        if self.pair == "none":
            return embed(tokens, mask)
        if self.pair == "joint":
            return embed(tokens, mask, token_types(self.config, tokens, self.separator_id))
        columns, ends, starts = _cut(tokens, self.separator_id)
        first = embed(tokens, mask & (columns <= ends))
        # the second text begins like any other: its separator becomes the mark of a start
        second = jnp.where(columns == starts, tokens[:, :1], tokens)
        second = embed(second, mask & (columns >= starts))
        return jnp.concatenate([first, second, first * second, jnp.abs(first - second)], axis=1)

    def _embed(self, body: Params, tokens, mask, types=None, *, dropout_key=None) -> Float[Array, "B D"]:
        hidden = self.body.hidden(body, tokens, mask, types, dropout_key=dropout_key)
        return self.pooling(hidden, mask)


@dataclass(frozen=True)
class EncoderClassifier:
    """An encoder with the head of its own folder, ``*ForSequenceClassification``, as a `SequenceScorer`.

    Attributes:
        encoder: with a head of the kind "sequence".
        separator_id: the token between a prompt and a text; None where rows are single texts.
    """

    encoder: Encoder
    separator_id: int | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers."""
        return self.encoder.config.labels

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        return self.encoder.config.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of the longest row that it can read; None has no bound."""
        return self.encoder.max_length

    def init(self, key: Array) -> Params:
        """Random parameters."""
        return self.encoder.init(key)

    def cast(self, params: Params) -> Params:
        """The same: the layers cast where they compute."""
        return params

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """One number a label, float32."""
        types = token_types(self.encoder.config, tokens, self.separator_id)
        return self.encoder.logits(params, tokens, attention_mask, types, dropout_key=dropout_key)


def token_types(
    config: EncoderConfig, tokens: Int[Array, "B T"], separator_id: int | None
) -> Int[Array, "B T"] | None:
    """0 up to the first separator, 1 behind it, as BERT reads pairs; None for encoders of one type."""
    if separator_id is None or config.token_types < 2:
        return None
    columns, ends, _ = _cut(tokens, separator_id)
    return (columns > ends).astype(jnp.int32)


def _cut(tokens: Int[Array, "B T"], separator_id: int | None) -> tuple[Array, Array, Array]:
    """(columns [1 T], where the first text ends, where the second begins [B 1]): at the first separator.

    A second one beside it, as RoBERTa's relatives write, begins the second text.
    """
    columns = jnp.arange(tokens.shape[1])[None]
    is_separator = tokens == separator_id
    ends = jnp.argmax(is_separator, axis=1)[:, None]
    ends = jnp.where(is_separator.any(axis=1, keepdims=True), ends, tokens.shape[1])
    doubled = jnp.take_along_axis(is_separator, jnp.minimum(ends + 1, tokens.shape[1] - 1), axis=1)
    return columns, ends, ends + doubled


def find_separator(folder: Path) -> int | None:
    """The id of the separator in a folder's tokenizer; None where its files do not say."""
    names, ids = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (names.is_file() and ids.is_file()):
        return None
    try:
        separator = read_json(names).get("sep_token")
        added = read_json(ids, MOST_TOKENIZER).get("added_tokens", ())
        content = separator.get("content") if isinstance(separator, dict) else separator
        return next((int(token["id"]) for token in added if token["content"] == content), None)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: the tokenizer's files are damaged: {error}") from error


@BACKBONES.register("encoder")
@settings(kw_only=True)
class TextEncoderConfig:
    """A `TextEncoder` as a trunk, a random or a pretrained one.

    Attributes:
        path: of a Hugging Face or sentence-transformers folder, or the id of one on the hub.
        encoder: the settings of a random encoder, in place of ``path``.
        pooling: of the hidden states: the mean over the tokens, or the first one.
        normalize: embeddings to length 1.
        pair: what is done with a prompt: "none" reads texts alone, "joint" both as one, "features" compares
            their embeddings.
        separator_id: the token between the two; None takes that of the folder's tokenizer.
        max_length: tokens a row at most; None takes all that the folder allows.
        dtype: of the computation.
    """

    path: str | None = None
    encoder: EncoderConfig | None = None
    pooling: Mode = "mean"
    normalize: bool = False
    pair: Pair = "none"
    separator_id: Natural | None = None
    max_length: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if (self.path is None) == (self.encoder is None):
            raise ValueError("path must be given, or encoder, and not both")

    def build(self, vocab_size: int | None = None) -> TextEncoder:
        """Reads the folder's settings, or takes those of ``encoder``, and makes the trunk."""
        folder = None if self.path is None else find_folder(self.path)
        body = Encoder(self.encoder) if self.encoder else load_encoder(folder or "", dtype=self.dtype)[0]
        if vocab_size is not None and body.config.vocab_size < vocab_size:
            raise UserError(
                f"the tokenizer has {vocab_size} tokens, more than the encoder's {body.config.vocab_size}: "
                "take the tokenizer that belongs to it"
            )
        separator = self.separator_id
        if separator is None and folder is not None:
            separator = find_separator(folder)
        if self.pair != "none" and separator is None:
            raise UserError(f"model.separator_id must be given for pair {self.pair}: no tokenizer says it")
        length = min(body.max_length, self.max_length or body.max_length)
        config = replace(body.config, pooler=False, head=None, labels=(), head_reads="pooler", dtype=self.dtype)
        trunk = config, Pooling(self.pooling, self.normalize, length), self.pair, separator
        return TextEncoder(*trunk) if folder is None else PretrainedTextEncoder(*trunk, start=str(folder))


@dataclass(frozen=True, kw_only=True)
class PretrainedTextEncoder(TextEncoder):
    """One whose parameters `init` reads out of a folder. Call it outside `jax.jit`."""

    start: str

    def init(self, key: Array) -> Params:
        """The parameters of the folder."""
        params = load_encoder(self.start)[1]
        wanted = jax.eval_shape(self.body.init, key)
        return {name: params[name] for name in wanted}
