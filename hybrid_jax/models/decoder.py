"""One configurable decoder-only transformer: GPT-2, Llama and their relatives are settings of it.

x = embed(tokens) (+ learned positions)
x = x + attention(norm(x));  x = x + mlp(norm(x))        a layer, residual branches may be dropped out
hidden = norm(x);  logits = hidden · Wᵀ                  W is the embedding where ``tie_embeddings``

The settings are in `decoder_config`, the modules in `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum, segment_positions
from hybrid_jax.models.attention import cached_attention, causal_attention
from hybrid_jax.models.base import ModelOutput, Params
from hybrid_jax.models.blocks import LOSSES, Attend, Network
from hybrid_jax.models.decoder_config import DecoderConfig
from hybrid_jax.models.lora import ADAPTER, adapted_linear, add_adapter, split

__all__ = ["Decoder", "DecoderCache", "DecoderConfig"]


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
        return add_adapter(self.config.lora, _init(self, key), jax.random.fold_in(key, 1))

    @property
    def loss_coefs(self) -> dict[str, float]:
        experts = self.config.experts
        coefs = {"router_balance": experts.balance_coef, "router_z": experts.z_coef} if experts else {}
        return {name: coef for name, coef in coefs.items() if coef}

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        return self.hidden_and_losses(params, tokens, attention_mask, dropout_key=dropout_key)[0]

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        if attention_mask is None:
            segment_ids, positions = None, jnp.arange(tokens.shape[1])[None]
            real = jnp.ones(tokens.shape, bool)
        else:
            segment_ids = attention_mask.astype(jnp.int32)
            positions, real = segment_positions(segment_ids), segment_ids > 0

        def attend(q, k, v, rule, sinks):
            return causal_attention(q, k, v, segment_ids, rule, sinks), None

        attends: list[Attend] = [attend] * self.config.num_layers
        hidden, _, losses = self._run(params, tokens, positions, real, attends, dropout_key)
        return hidden, {name: losses[name] for name in self.loss_coefs}

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        c, adapters = self.config, params.get(ADAPTER, {})
        mapped = partial(adapted_linear, c.lora, dtype=hidden.dtype)
        if c.embedding_width is not None:
            hidden = mapped(adapters.get("embedding_out"), hidden, params["embedding_out"]["kernel"])
        kernel = params["token_embedding"]["embedding"].T if c.tie_embeddings else params["lm_head"]["kernel"]
        bias = params["lm_head"]["bias"] if c.head_bias else None
        logits = mapped(adapters.get("lm_head"), hidden, kernel, bias, out_dtype=jnp.float32)
        if c.logit_scale != 1.0:
            logits = logits * c.logit_scale
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

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

        def attend(q, k, v, rule, sinks, keys, values):
            return causal_attention(q, k, v, segment_ids, rule, sinks), _write(keys, values, k, v, 0)

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

        def attend(q, k, v, rule, sinks, keys, values):
            keys, values = _write(keys, values, k, v, cache.slot)
            mixed = cached_attention(q[:, 0], keys, values, key_mask, cache.slot, rule, sinks)
            return mixed[:, None], (keys, values)

        after = replace(cache, key_mask=key_mask, positions=cache.positions + 1, slot=cache.slot + 1)
        return self._read(params, token[:, None], cache.positions[:, None], attend, after)

    def _read(self, params, tokens, positions, attend, cache: DecoderCache):
        """Reads tokens into the keys and values of the cache; returns the scores after the last one."""
        layers = zip(cache.keys, cache.values, strict=True)
        attends = [partial(attend, keys=keys, values=values) for keys, values in layers]
        hidden, kept, _ = self._run(params, tokens, positions, jnp.ones(tokens.shape, bool), attends)
        keys, values = zip(*kept, strict=True)
        return self.logits(params, hidden[:, -1]), replace(cache, keys=keys, values=values)

    def _run(self, params, tokens, positions, real, attends: list[Attend], dropout_key=None):
        """Hidden states, what the layers kept, and the losses of the routers, averaged over the layers."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        network = Network(self.config)
        adapter, base = split(params) if ADAPTER in params else ({}, params)
        (hidden, kept), written = network.apply(
            {"params": base, **adapter}, tokens, positions, real, attends, rngs=rngs, mutable=[LOSSES]
        )
        routers: list[dict[str, Sum]] = jax.tree.leaves(written, is_leaf=lambda node: "router_z" in node)
        losses = jax.tree.map(lambda *layers: sum(layers) / len(layers), *routers) if routers else {}
        return hidden, kept, losses


@partial(jax.jit, static_argnames="model")
def _init(model: Decoder, key: Array) -> Params:
    attend = lambda q, k, v, rule, sinks: (q, None)  # noqa: E731
    tokens = jnp.zeros((1, 1), jnp.int32)
    attends: list[Attend] = [attend] * model.config.num_layers
    variables = Network(model.config).init(key, tokens, tokens, tokens == 0, attends)
    return dict(variables["params"])


def _write(keys, values, k: Float[Array, "B T K C"], v, slot) -> tuple[Array, Array]:
    write = lambda cache, new: lax.dynamic_update_slice(cache, new.swapaxes(1, 2), (0, 0, slot, 0))  # noqa: E731
    return write(keys, k), write(values, v)
