"""Models that turn a text into numbers: a trunk that reads it, and a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.models.heads import Head
from hybrid_jax.models.layers import linear

_TRUNK_DROPOUT = 1  # below a key whose own numbers the head draws


class Reader(Protocol):
    """A model that reads rows of tokens, as pure functions over a parameter tree.

    Hashable, so that it can be a static argument of `jax.jit`.
    """

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row that it can read; None has no bound."""
        ...

    def init(self, key: Array) -> Params:
        """Random parameters."""
        ...

    def cast(self, params: Params) -> Params:
        """The parameters as the computation reads them; see `LanguageModel.cast`."""
        ...


@runtime_checkable
class SequenceScorer(Reader, Protocol):
    """A map from a row of tokens to one number a label; what `data.scored_text` encodes, it reads."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers: classes of logits, or what a regression predicts."""
        ...

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """One number a label, float32. Padding (mask False) changes nothing. Dropout acts only with a key."""
        ...


@runtime_checkable
class TextTrunk(Reader, Protocol):
    """A trunk that gives one vector a text, for heads to read."""

    @property
    def num_features(self) -> int:
        """F, numbers a text."""
        ...

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B F"]:
        """The vector of each text, float32. Padding changes nothing. Dropout acts only with a key."""
        ...


@dataclass(frozen=True)
class LastState:
    """A language model as a `TextTrunk`: the hidden state that has read all of a text."""

    model: LanguageModel

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row that it can read; None has no bound."""
        return self.model.max_length

    @property
    def num_features(self) -> int:
        """F, numbers a text."""
        return getattr(getattr(self.model, "config", None), "embedding_width", None) or self.model.width

    def init(self, key: Array) -> Params:
        """Random parameters."""
        return self.model.init(key)

    def cast(self, params: Params) -> Params:
        """The parameters as the computation reads them."""
        return self.model.cast(params)

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B F"]:
        """The hidden state behind the last token of each text, float32."""
        hidden = self.model.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return at_last_token(params, hidden, attention_mask).astype(jnp.float32)


def at_last_token(
    params: Params, hidden: Float[Array, "B T D"], attention_mask: Bool[Array, "B T"] | Int[Array, "B T"]
) -> Float[Array, "B F"]:
    """The state of the last real token of each row, wherever its padding is, as a decoder's heads read it."""
    last = hidden.shape[1] - 1 - jnp.argmax(attention_mask[:, ::-1] > 0, axis=1)
    read = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    if "embedding_out" in params:  # of decoders whose embeddings are narrower than they are
        read = linear(read, params["embedding_out"]["kernel"].astype(read.dtype))
    return read


def text_trunk(model: Any) -> TextTrunk:
    """The trunk that heads read, out of a run's model.

    Raises:
        UserError: it is no trunk for texts.
    """
    if isinstance(model, TextTrunk):
        return model
    if isinstance(model, LanguageModel) and not isinstance(model, EncoderDecoder):
        return LastState(model)
    raise UserError(f"a head reads a decoder, an encoder or ngrams, got {type(model).__name__}")


@dataclass(frozen=True)
class TextScorer:
    """A trunk and a head as a `SequenceScorer`; its parameters are ``{"trunk": …, "head": …}``."""

    trunk: Any  # a `TextTrunk`
    head: Head

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers."""
        return self.head.labels

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, V."""
        return self.trunk.vocab_size

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest row that it can read; None has no bound."""
        return self.trunk.max_length

    def init(self, key: Array) -> Params:
        """Random parameters of both."""
        return {"trunk": self.trunk.init(key), "head": self.head.init(key, self.trunk.num_features)}

    def cast(self, params: Params) -> Params:
        """The trunk's as it casts them; the head stays as it is."""
        return {"trunk": self.trunk.cast(params["trunk"]), "head": params["head"]}

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """One number a label, float32."""
        below = None if dropout_key is None else jax.random.fold_in(dropout_key, _TRUNK_DROPOUT)
        features = self.features(params, tokens, attention_mask, dropout_key=below)
        return self.read(params, features, dropout_key=dropout_key)

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B F"]:
        """The features that the head reads; where the trunk does not train, without its dropout or gradient."""
        trunk = params["trunk"]
        if not self.head.trains_trunk:
            trunk, dropout_key = jax.lax.stop_gradient(trunk), None
        return self.trunk.features(trunk, tokens, attention_mask.astype(bool), dropout_key=dropout_key)

    def read(
        self, params: Params, features: Float[Array, "B F"], *, dropout_key: Array | None = None
    ) -> Float[Array, "B Y"]:
        """The numbers that the head reads off the features."""
        return self.head.read(params["head"], features, dropout_key=dropout_key)
