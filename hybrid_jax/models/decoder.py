"""One configurable decoder-only transformer: GPT-2, Llama and their relatives are settings of it.

x = embed(tokens) (+ learned positions)
x = x + attention(norm(x));  x = x + mlp(norm(x))        a layer, residual branches may be dropped out
hidden = norm(x);  logits = hidden · Wᵀ                  W is the embedding where ``tie_embeddings``
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import segment_positions
from hybrid_jax.core.registry import UserError
from hybrid_jax.models.attention import cached_attention, causal_attention
from hybrid_jax.models.base import BACKBONES, ModelOutput, Params
from hybrid_jax.models.layers import ACTIVATIONS, layer_norm, linear, rms_norm, rotary_angles, rotate

Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
Attend = Callable[
    [Array, Array, Array], tuple[Array, Any]
]  # (q, k, v) -> mixed values, what to keep of the layer


@BACKBONES.register("decoder")
@dataclass(frozen=True)
class DecoderConfig:
    """Every switch of the decoder. ``None`` means the usual choice, named behind it."""

    num_layers: int = 4
    width: int = 256
    num_heads: int = 8
    num_kv_heads: int | None = None  # num_heads
    head_width: int | None = None  # width // num_heads
    mlp_width: int | None = None  # 4 * width
    max_length: int = 1024
    vocab_size: int | None = None  # the tokenizer's
    position: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    norm: Literal["layer", "rms"] = "layer"
    norm_epsilon: float = 1e-5
    mlp: Literal["plain", "gated"] = "plain"
    activation: Activation = "gelu_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters and logits are float32

    def __post_init__(self):
        sizes = (
            "num_layers",
            "width",
            "num_heads",
            "num_kv_heads",
            "head_width",
            "mlp_width",
            "max_length",
            "vocab_size",
        )
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.head_width is None and self.width % self.num_heads:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.position == "rotary" and self.channels % 2:
            raise ValueError(f"head_width must be even for rotary positions, got {self.channels}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def channels(self) -> int:
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def inner_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def build(self, vocab_size: int | None = None) -> Decoder:
        """The model for a tokenizer of ``vocab_size`` tokens; an own ``vocab_size`` may be larger."""
        size = self.vocab_size or vocab_size
        if size is None:
            raise UserError("vocab_size is missing: the decoder names none and there is no tokenizer")
        if vocab_size is not None and size < vocab_size:
            raise UserError(f"vocab_size must be at least the tokenizer's {vocab_size}, got {size}")
        return Decoder(replace(self, vocab_size=size))


@struct.dataclass
class DecoderCache:
    """Keys and values of the tokens read so far; rows are left-padded, so all of them write the same slot."""

    keys: tuple[Float[Array, "B K S C"], ...]  # one a layer
    values: tuple[Float[Array, "B K S C"], ...]
    key_mask: Bool[Array, "B S"]
    positions: Int[Array, "B"]  # of the next token, padding not counted
    slot: Int[Array, ""]


@dataclass(frozen=True)
class Decoder:
    """The decoder as a `LanguageModel`: hashable, so that it can be a static argument of `jax.jit`."""

    config: DecoderConfig

    @property
    def vocab_size(self) -> int:
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def max_length(self) -> int:
        return self.config.max_length

    def init(self, key: Array) -> Params:
        return _init(self, key)

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        if attention_mask is None:
            segment_ids, positions = None, jnp.arange(tokens.shape[1])[None]
        else:
            segment_ids = attention_mask.astype(jnp.int32)
            positions = segment_positions(segment_ids)
        attend = lambda q, k, v: (causal_attention(q, k, v, segment_ids), None)  # noqa: E731
        hidden, _ = self._run(params, tokens, positions, [attend] * self.config.num_layers, dropout_key)
        return hidden

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        if self.config.tie_embeddings:
            kernel = params["token_embedding"]["embedding"].T
        else:
            kernel = params["lm_head"]["kernel"]
        return linear(hidden, kernel.astype(hidden.dtype), out_dtype=jnp.float32)

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def init_cache(self, batch: int, length: int) -> DecoderCache:
        c = self.config
        empty = jnp.zeros((batch, c.kv_heads, length, c.channels), c.dtype)
        return DecoderCache(
            keys=(empty,) * c.num_layers,
            values=(empty,) * c.num_layers,
            key_mask=jnp.zeros((batch, length), bool),
            positions=jnp.zeros(batch, jnp.int32),
            slot=jnp.int32(0),
        )

    def prefill(
        self, params, tokens, attention_mask, cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        segment_ids = attention_mask.astype(jnp.int32)

        def attend(q, k, v, keys, values):
            return causal_attention(q, k, v, segment_ids), _write(keys, values, k, v, 0)

        cache = replace(
            cache,
            key_mask=lax.dynamic_update_slice(cache.key_mask, attention_mask.astype(bool), (0, 0)),
            positions=jnp.sum(segment_ids, axis=1),
            slot=jnp.int32(tokens.shape[1]),
        )
        return self._read(params, tokens, segment_positions(segment_ids), attend, cache)

    def step(
        self, params, token: Int[Array, "B"], cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        key_mask = lax.dynamic_update_slice(
            cache.key_mask, jnp.ones((token.shape[0], 1), bool), (0, cache.slot)
        )

        def attend(q, k, v, keys, values):
            keys, values = _write(keys, values, k, v, cache.slot)
            return cached_attention(q[:, 0], keys, values, key_mask)[:, None], (keys, values)

        after = replace(cache, key_mask=key_mask, positions=cache.positions + 1, slot=cache.slot + 1)
        return self._read(params, token[:, None], cache.positions[:, None], attend, after)

    def _read(self, params, tokens, positions, attend, cache: DecoderCache):
        """Reads tokens into the keys and values of the cache; returns the scores after the last one."""
        layers = zip(cache.keys, cache.values, strict=True)
        attends = [partial(attend, keys=keys, values=values) for keys, values in layers]
        hidden, kept = self._run(params, tokens, positions, attends)
        keys, values = zip(*kept, strict=True)
        return self.logits(params, hidden[:, -1]), replace(cache, keys=keys, values=values)

    def _run(self, params, tokens, positions, attends: list[Attend], dropout_key=None):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return _Network(self.config).apply({"params": params}, tokens, positions, attends, rngs=rngs)


@partial(jax.jit, static_argnames="model")
def _init(model: Decoder, key: Array) -> Params:
    attend = lambda q, k, v: (q, None)  # noqa: E731
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = _Network(model.config).init(key, tokens, tokens, [attend] * model.config.num_layers)
    return dict(variables["params"])


def _write(keys, values, k: Float[Array, "B T K C"], v, slot) -> tuple[Array, Array]:
    write = lambda cache, new: lax.dynamic_update_slice(cache, new.swapaxes(1, 2), (0, 0, slot, 0))  # noqa: E731
    return write(keys, k), write(values, v)


# ------------------------------------------------------------------------------------------------ modules


class _Network(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens, positions, attends: list[Attend]):
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=c.dropout == 0.0 or not self.has_rng("dropout"))
        x = _Embedding(c.vocab_size, c, name="token_embedding")(tokens)
        if c.position == "learned":
            x = x + _Embedding(c.max_length, c, name="position_embedding")(positions)
        x, kept = drop(x), []
        for i, attend in enumerate(attends):
            x, keep = _Layer(c, name=f"layer_{i}")(x, positions, attend, drop)
            kept.append(keep)
        if not c.tie_embeddings and self.is_initializing():
            _Linear(c.vocab_size, False, c.init_std, c.dtype, name="lm_head")(x)  # `Decoder.logits` reads it
        return _Norm(c, name="final_norm")(x), kept


class _Layer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, positions, attend: Attend, drop: nn.Dropout):
        c = self.config
        mixed, kept = _Attention(c, name="attention")(_Norm(c, name="attention_norm")(x), positions, attend)
        x = x + drop(mixed)
        x = x + drop(_Mlp(c, name="mlp")(_Norm(c, name="mlp_norm")(x)))
        return x, kept


class _Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions, attend: Attend):
        c = self.config
        heads = {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}
        project = partial(_Linear, use_bias=c.attention_bias, init_std=c.init_std, dtype=c.dtype)
        q, k, v = (
            project(n * c.channels, name=name)(x).reshape(*x.shape[:2], n, c.channels)
            for name, n in heads.items()
        )
        if c.position == "rotary":
            angles = rotary_angles(positions, c.channels, c.rope_theta)
            q, k = rotate(q, angles), rotate(k, angles)
        mixed, kept = attend(q, k, v)
        out = _Linear(c.width, c.attention_bias, _residual_std(c), c.dtype, name="output")
        return out(mixed.reshape(*x.shape[:2], c.num_heads * c.channels)), kept


class _Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]):
        c = self.config
        inner = partial(_Linear, c.inner_width, c.mlp_bias, c.init_std, c.dtype)
        activate, up = ACTIVATIONS[c.activation], inner(name="up")(x)
        x = activate(inner(name="gate")(x)) * up if c.mlp == "gated" else activate(up)
        return _Linear(c.width, c.mlp_bias, _residual_std(c), c.dtype, name="down")(x)


def _residual_std(config: DecoderConfig) -> float:
    """GPT-2 shrinks what writes into the residual stream by √(number of residual branches)."""
    return config.init_std / math.sqrt(2 * config.num_layers)


class _Linear(nn.Module):
    features: int | None
    use_bias: bool
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        return linear(x, kernel.astype(self.dtype), bias)


class _Norm(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        scale = self.param("scale", nn.initializers.ones, (c.width,))
        if c.norm == "rms":
            return rms_norm(x, scale, c.norm_epsilon)
        return layer_norm(x, scale, self.param("bias", nn.initializers.zeros, (c.width,)), c.norm_epsilon)


class _Embedding(nn.Module):
    rows: int | None
    config: DecoderConfig

    @nn.compact
    def __call__(self, indices):
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.init_std), (self.rows, c.width))
        return jnp.take(table, indices, axis=0).astype(c.dtype)
