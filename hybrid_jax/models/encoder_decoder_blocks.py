"""The modules of the encoder-decoder: a bias by relative position, layers of attention and MLP.

A layer: x = x + attention(norm(x)); of the decoder then x = x + cross(norm(x)); x = x + mlp(norm(x)).
Norms are RMS norms, nothing but the norms has a scale, nothing has a bias (Raffel et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from hybrid_jax.models.blocks import Linear
from hybrid_jax.models.encoder_blocks import Embedding, Norm
from hybrid_jax.models.encoder_decoder_config import EncoderDecoderSettings
from hybrid_jax.models.layers import ACTIVATIONS

Drop = Callable[[Array], Array]
Project = Callable[[Array], tuple[Array, Array]]  # what is attended to -> keys and values [B S H C]
# (q, x, project, bias, drop) -> mixed values [B T H C], what to keep of the layer
Attend = Callable[[Array, Array, Project, Array | None, Drop], tuple[Array, Any]]


def relative_buckets(
    distance: Int[Array, "... T S"], num_buckets: int, max_distance: int, both_ways: bool
) -> Int[Array, "... T S"]:
    """The bucket of each distance, key position − query position (Raffel et al. 2020, section 2.1).

    Half of the buckets are of one distance each, from 0; the others grow with its logarithm up to
    ``max_distance``. With ``both_ways`` one half of all is for keys behind the query; else those are in
    bucket 0, as they are never seen.
    """
    count = num_buckets // 2 if both_ways else num_buckets
    exact = count // 2
    far = np.arange(exact, max_distance + 1, dtype=np.float32)
    steps = np.log(far / exact) / np.float32(math.log(max_distance / exact)) * np.float32(count - exact)
    table = np.concatenate([np.arange(exact), np.minimum(exact + steps.astype(np.int32), count - 1)])
    before = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    bucket = jnp.asarray(table, jnp.int32)[jnp.minimum(before, max_distance)]
    return bucket + count * (distance > 0) if both_ways else bucket


class Network(nn.Module):
    """Encoder and decoder over one embedding."""

    config: EncoderDecoderSettings

    def setup(self):
        """Makes the parts that both methods use."""
        c = self.config
        bias = partial(Embedding, c.num_buckets, c.num_heads, c.init_factor * c.width**-0.5, "float32")
        self.token_embedding = Embedding(c.vocab_size or 0, c.width, c.init_factor, c.dtype)
        self.encoder_bias, self.decoder_bias = bias(), bias()
        self.encoder_layer = [Layer(c) for _ in range(c.num_layers)]
        self.decoder_layer = [Layer(c) for _ in range(c.decoder_layers)]
        self.encoder_norm, self.decoder_norm = (Norm(c.norm_epsilon, centered=False) for _ in range(2))
        self.lm_head = Linear(c.vocab_size, False, c.init_factor * c.width**-0.5, c.dtype)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, tokens, attend: Attend, cross: Attend):
        """Only to make the parameters."""
        distance = jnp.zeros((1, 1, 1), jnp.int32)
        self.encode(tokens, distance, attend)
        x, _ = self.decode(tokens, distance, [(attend, cross)] * self.config.decoder_layers)
        return x if self.config.tie_embeddings else self.lm_head(x)

    def encode(self, tokens: Int[Array, "B S"], distance: Int[Array, "1 S S"], attend: Attend):
        """States of the sources."""
        x, bias = self._drop(self.token_embedding(tokens)), self._bias(self.encoder_bias, distance, True)
        for layer in self.encoder_layer:
            x, _ = layer(x, attend, None, bias, self._drop)
        return self._drop(self.encoder_norm(x))

    def decode(
        self, tokens: Int[Array, "B T"], distance: Int[Array, "#B T S"], attends: list[tuple[Attend, Attend]]
    ):
        """Hidden states, and what each layer's two attentions kept."""
        x, bias = self._drop(self.token_embedding(tokens)), self._bias(self.decoder_bias, distance, False)
        kept = []
        for layer, (attend, cross) in zip(self.decoder_layer, attends, strict=True):
            x, keep = layer(x, attend, cross, bias, self._drop)
            kept.append(keep)
        return self._drop(self.decoder_norm(x)), kept

    def _bias(self, embedding: Embedding, distance, both_ways: bool) -> Float[Array, "#B H T S"]:
        c = self.config
        biases = embedding(relative_buckets(distance, c.num_buckets, c.max_distance, both_ways))
        return rearrange(biases, "b t s h -> b h t s")

    def _drop(self, x: Array) -> Array:
        return self.dropout(x, deterministic=not self.has_rng("dropout"))


class Layer(nn.Module):
    """Attention, in the decoder cross-attention, and an MLP, each on a residual branch."""

    config: EncoderDecoderSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], attend: Attend, cross: Attend | None, bias, drop: Drop):
        c = self.config
        norm = partial(Norm, c.norm_epsilon, centered=False)
        mixed, kept = Attention(c, name="attention")(norm(name="attention_norm")(x), attend, bias, drop)
        x, kept_cross = x + drop(mixed), None
        if cross is not None:
            mixed, kept_cross = Attention(c, name="cross")(norm(name="cross_norm")(x), cross, None, drop)
            x = x + drop(mixed)
        return x + drop(Mlp(c, name="mlp")(norm(name="mlp_norm")(x), drop)), (kept, kept_cross)


class Attention(nn.Module):
    """Projections around an `Attend`."""

    config: EncoderDecoderSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], attend: Attend, bias, drop: Drop):
        c = self.config
        inner = c.num_heads * c.channels

        def heads(name: str, x: Array, std: float) -> Array:
            y = Linear(inner, False, c.init_factor * std, c.dtype, name=name)(x)
            return rearrange(y, "b t (h c) -> b t h c", h=c.num_heads)

        def project(source: Array) -> tuple[Array, Array]:
            return heads("key", source, c.width**-0.5), heads("value", source, c.width**-0.5)

        # Scores are not scaled: the small queries of the start stand for it.
        q = heads("query", x, (c.width * c.channels) ** -0.5)
        mixed, kept = attend(q, x, project, bias, drop)
        out = Linear(c.width, False, c.init_factor * inner**-0.5, c.dtype, name="output")
        return out(rearrange(mixed, "b t h c -> b t (h c)")), kept


class Mlp(nn.Module):
    """An MLP, plain or gated."""

    config: EncoderDecoderSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], drop: Drop):
        c = self.config
        inner = partial(Linear, c.inner_width, False, c.init_factor * c.width**-0.5, c.dtype)
        activate, up = ACTIVATIONS[c.activation], inner(name="up")(x)
        x = drop(activate(inner(name="gate")(x)) * up if c.mlp == "gated" else activate(up))
        return Linear(c.width, False, c.init_factor * c.inner_width**-0.5, c.dtype, name="down")(x)
