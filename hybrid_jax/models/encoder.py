"""One configurable bidirectional encoder: BERT, RoBERTa, DistilBERT are settings of it.

x = norm(word + position (+ type))
x = norm(x + attention(x));  x = norm(x + mlp(x))            a layer (Devlin et al. 2019)

A head reads the last x: of the first token (sequence classification), of every token (token classification),
or two scores a token, where an answer starts and ends (question answering).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import segment_positions
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import (
    Count,
    Layers,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Vocabulary,
    Width,
    settings,
)
from hybrid_jax.models.base import Params
from hybrid_jax.models.blocks import Linear
from hybrid_jax.models.decoder_config import Activation
from hybrid_jax.models.encoder_blocks import Embedding, Norm, masked_attention
from hybrid_jax.models.layers import ACTIVATIONS, linear
from hybrid_jax.models.pooling import Pooling, cls_pooling


@settings
class EncoderConfig:
    """Every switch of the encoder. ``None`` means the usual choice, named behind it."""

    vocab_size: Vocabulary  # rows of the word embedding
    num_layers: Layers = 4  # how many
    width: Width = 256  # of the hidden states
    num_heads: Width = 8  # of attention; they divide the width
    mlp_width: Width | None = None  # of the hidden layer of a branch; null is 4 * width
    max_length: Count = 512  # tokens of the longest row
    position_offset: Natural = 0  # rows of the position table before the one of position 0
    token_types: Natural = 2  # rows of the table of token types; 0 is none
    pad_id: Natural | None = 0  # only written down for others: padding is what the mask says
    activation: Activation = "gelu"  # of the MLPs
    norm_epsilon: Positive = 1e-12  # added to the variance in a norm

    pooler: bool = True  # tanh(W x + b) of the first token
    head: Literal["sequence", "token", "question"] | None = None  # what reads the last states; null: nothing
    labels: tuple[str, ...] = ()  # names of the classes of a sequence or token head
    head_reads: Literal["pooler", "tanh", "relu"] = "pooler"  # the pooler, or a map on the first token

    dropout: Rate = 0.0  # of the hidden states
    attention_dropout: Rate = 0.0  # of the attention's weights
    head_dropout: Rate = 0.0  # of what a head reads
    init_std: NonNegative = 0.02  # of the initial parameters
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and logits are float32
    family: str | None = None  # Hugging Face model_type to export as; null: the first that can express it

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if (self.head in ("sequence", "token")) != bool(self.labels):
            needs = "name the classes" if self.head in ("sequence", "token") else "be empty"
            raise ValueError(f"labels must {needs} for head {self.head!r}, got {self.labels}")
        if self.head == "sequence" and self.head_reads == "pooler" and not self.pooler:
            raise ValueError("pooler must be true for a sequence head that reads it, got False")

    @property
    def inner_width(self) -> int:
        """Width of the hidden layer of an MLP."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def num_outputs(self) -> int:
        """Scores of the head: one a class, or the start and the end of an answer."""
        return 2 if self.head == "question" else len(self.labels)

    @property
    def head_name(self) -> str:
        """The name of the head among the parameters."""
        return "qa_outputs" if self.head == "question" else "classifier"

    @property
    def has_dense(self) -> bool:
        """Tells whether the head has a map of its own before its last one."""
        return self.head == "sequence" and self.head_reads != "pooler"

    def resolved(self) -> EncoderConfig:
        """The same encoder with every choice spelled out, so that equal encoders compare equal."""
        reads = self.head_reads if self.head == "sequence" else "pooler"
        return replace(self, mlp_width=self.inner_width, head_reads=reads)


@dataclass(frozen=True)
class Encoder:
    """The encoder as pure functions over parameters: hashable, a static argument of `jax.jit`.

    ``attention_mask`` [B T] is bool (True is a token) or int: then it numbers the packed sequences of a row
    and 0 is padding. A token sees all tokens of its own sequence. Positions count from the start of the
    sequence, whatever the tokens are, so padding on either side changes nothing; padding inside a sequence is
    not meant to be. `transformers` counts BERT's positions from the row's start, and RoBERTa's over all that
    is not the pad token: the same for rows that are padded on the right with it.
    """

    config: EncoderConfig
    pooling: Pooling | None = None  # of a folder of sentence-transformers

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.config.width

    @property
    def max_length(self) -> int:
        """Tokens to cut a text to: a folder of sentence-transformers may read fewer than the model can."""
        allowed = self.pooling.max_length if self.pooling is not None else None
        return min(self.config.max_length, allowed or self.config.max_length)

    def init(self, key: Array) -> Params:
        """Random parameters."""
        return _init(self.config, key)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; those of padding mean nothing. Dropout acts only where a key is given.

        Raises:
            UserError: rows longer than ``config.max_length``, or token types for a model without them.
        """
        c = self.config
        if tokens.shape[1] > c.max_length:
            raise UserError(f"rows must have at most max_length {c.max_length} tokens, got {tokens.shape[1]}")
        if token_types is not None and not c.token_types:
            raise UserError("token_types must be None: this encoder has no table of token types")
        segment_ids = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        hidden: Any = _Network(c).apply({"params": params}, tokens, segment_ids, types, rngs=rngs)
        return hidden

    def pooled(
        self,
        params: Params,
        hidden: Float[Array, "B T D"],
        attention_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B D"]:
        """``tanh(W x + b)`` of the first token: BERT's summary of the row."""
        if not self.config.pooler:
            raise UserError("this encoder has no pooler; use sentence_embeddings or hidden")
        return jnp.tanh(_map(params["pooler"], cls_pooling(hidden, _real(hidden, attention_mask))))

    def sentence_embeddings(self, params, tokens, attention_mask=None, token_types=None) -> Float[Array, "B D"]:
        """One vector a row, float32, as ``pooling`` says: by default the mean over its tokens, of length 1."""
        hidden = self.hidden(params, tokens, attention_mask, token_types)
        return (self.pooling or Pooling())(hidden, _real(hidden, attention_mask))

    def logits(
        self, params, tokens, attention_mask=None, token_types=None, *, dropout_key=None
    ) -> Float[Array, "B Y"] | Float[Array, "B T Y"]:
        """Scores of the head, float32.

        Returns:
            [B Y] of a sequence head, which reads the first token; [B T Y] of a token head; [B T 2] of a
            question head: how well the answer starts, and ends, at each token.
        """
        c = self.config
        if c.head is None:
            raise UserError("this encoder has no head: set head and labels, or load a folder that has one")
        body_key, *keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        x = self.hidden(params, tokens, attention_mask, token_types, dropout_key=body_key)
        if c.head == "sequence":
            pool = partial(self.pooled, params) if c.head_reads == "pooler" else cls_pooling
            x = pool(x, _real(x, attention_mask))
        if c.has_dense:
            # RoBERTa drops out before its own map as well, DistilBERT does not.
            x = self._drop(x, keys[0]) if c.head_reads == "tanh" else x
            activate = jnp.tanh if c.head_reads == "tanh" else jax.nn.relu
            x = activate(_map(params["classifier_dense"], x))
        return _map(params[c.head_name], self._drop(x, keys[1]), jnp.float32)

    def _drop(self, x: Array, key: Array | None) -> Array:
        rate = self.config.head_dropout
        if key is None or rate == 0.0:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def _real(hidden: Float[Array, "B T D"], attention_mask: Array | None) -> Bool[Array, "B T"]:
    return jnp.ones(hidden.shape[:2], bool) if attention_mask is None else attention_mask.astype(bool)


def _map(params: Params, x: Array, out_dtype=None) -> Array:
    return linear(x, params["kernel"].astype(x.dtype), params["bias"], out_dtype)


@partial(jax.jit, static_argnames="config")
def _init(config: EncoderConfig, key: Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return dict(_Network(config).init(key, tokens, tokens + 1, tokens)["params"])


class _Network(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"], types: Int[Array, "B T"]):
        c = self.config
        embedding = partial(Embedding, width=c.width, init_std=c.init_std, dtype=c.dtype)
        positions = segment_positions(segment_ids) + c.position_offset
        x = embedding(c.vocab_size, name="token_embedding")(tokens)
        x = x + embedding(c.max_length + c.position_offset, name="position_embedding")(positions)
        if c.token_types:
            x = x + embedding(c.token_types, name="type_embedding")(types)
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        x = drop(Norm(c.norm_epsilon, name="embedding_norm")(x))
        visible = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        for i in range(c.num_layers):
            x = _Layer(c, name=f"layer_{i}")(x, visible, drop)
        if self.is_initializing():
            self._init_head(x)
        return x

    def _init_head(self, x) -> None:
        """`Encoder.pooled` and `Encoder.logits` read these."""
        c = self.config
        own = partial(Linear, use_bias=True, init_std=c.init_std, dtype=c.dtype)
        if c.pooler:
            own(c.width, name="pooler")(x)
        if c.has_dense:
            own(c.width, name="classifier_dense")(x)
        if c.head is not None:
            own(c.num_outputs, name=c.head_name)(x)


class _Layer(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], visible: Bool[Array, "B 1 T T"], drop: nn.Dropout):
        c = self.config
        x = x + drop(_Attention(c, name="attention")(x, visible, drop.deterministic))
        x = Norm(c.norm_epsilon, name="attention_norm")(x)
        x = x + drop(_Mlp(c, name="mlp")(x))
        return Norm(c.norm_epsilon, name="mlp_norm")(x)


class _Attention(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], visible: Bool[Array, "B 1 T T"], deterministic: bool | None):
        c = self.config
        mapped = partial(Linear, c.width, True, c.init_std, c.dtype)
        q, k, v = (
            rearrange(mapped(name=name)(x), "b t (h c) -> b t h c", h=c.num_heads)
            for name in ("query", "key", "value")
        )
        drop = nn.Dropout(c.attention_dropout, deterministic=deterministic)
        mixed = masked_attention(q, k, v, visible, q.shape[-1] ** -0.5, drop=drop)
        return mapped(name="output")(rearrange(mixed, "b t h c -> b t (h c)"))


class _Mlp(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]):
        c = self.config
        inner = Linear(c.inner_width, True, c.init_std, c.dtype, name="up")(x)
        return Linear(c.width, True, c.init_std, c.dtype, name="down")(ACTIVATIONS[c.activation](inner))
