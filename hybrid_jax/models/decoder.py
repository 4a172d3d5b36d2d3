"""One configurable decoder-only transformer: GPT-2, Llama and their relatives are settings of it.

x = embed(tokens) (+ learned positions)
x = x + attention(norm(x));  x = x + mlp(norm(x))        a layer, residual branches may be dropped out
hidden = norm(x);  logits = hidden · Wᵀ                  W is the embedding where ``tie_embeddings``

The settings are in `decoder_config`, the modules in `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hybrid_jax.core.arrays import Sum, segment_lengths, segment_positions
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Parameters
from hybrid_jax.core.ranges import settings
from hybrid_jax.models.attention.choice import causal_attention
from hybrid_jax.models.attention.einsum import cached_attention
from hybrid_jax.models.base import BACKBONES, ModelOutput, Params
from hybrid_jax.models.blocks import LOSSES, Attend, Network
from hybrid_jax.models.decoder_cache import EMPTY, DecoderCache
from hybrid_jax.models.decoder_config import DecoderSettings
from hybrid_jax.models.layers import placed_logits
from hybrid_jax.models.lora import ADAPTER, adapted_linear, add_adapter, overlaid
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.stacking import cast_kernels, stack_layers, unstack_layers
from hybrid_jax.models.vocabulary import embedding_rows
from hybrid_jax.parallel.rules import made_in_parts, shard


@BACKBONES.register("decoder")
@settings
class DecoderConfig(DecoderSettings):
    """The decoder, and how it is built. ``None`` means the usual choice, named behind it."""

    def build(self, vocab_size: int | None = None) -> Decoder:
        """The model for a tokenizer of ``vocab_size`` tokens; an own ``vocab_size`` may be larger."""
        if self.lora is not None and self.lora.path is not None:
            raise UserError("lora.path needs the model that it was trained on: model.name pretrained")
        return Decoder(replace(self, vocab_size=embedding_rows(self.vocab_size, vocab_size)))


@dataclass(frozen=True)
class Decoder:
    """The decoder as a `LanguageModel`: hashable, so that it can be a static argument of `jax.jit`."""

    config: DecoderConfig

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        assert self.config.vocab_size is not None
        return self.config.vocab_size

    @property
    def width(self) -> int:
        """Channels of a hidden state, D."""
        return self.config.width

    @property
    def max_length(self) -> int:
        """Longest sequence that may be read."""
        return self.config.max_length

    def init(self, key: Array) -> Params:
        """Makes random parameters, each device only its own part; an adapter's stand beside them."""
        return made_in_parts(param_axes, self._init, key)

    def _init(self, key: Array) -> Params:
        params = add_adapter(self.config.lora, _init(self, key), jax.random.fold_in(key, Parameters.ADAPTER))
        return self.arranged(params)

    def arranged(self, params: Params) -> Params:
        """Parameters whose layers are a list, as this decoder computes with them (`stacking`)."""
        c = self.config
        return stack_layers(params, c.period) if c.execution.scan_layers else params

    def as_list(self) -> Decoder:
        """The same decoder over layers in a list."""
        c = self.config
        return replace(self, config=replace(c, execution=replace(c.execution, scan_layers=False)))

    def listed(self, params: Params) -> Params:
        """The parameters of `as_list`."""
        c = self.config
        return unstack_layers(params, c.period) if c.execution.scan_layers else params

    def cast(self, params: Params) -> Params:
        """`LanguageModel.cast`: kernels and embeddings in the dtype of the computation."""
        c = self.config
        if c.lora is not None and c.lora.dora:  # whose gains read the base in float32
            return params
        return cast_kernels(params, c.dtype)

    @property
    def loss_coefs(self) -> dict[str, float]:
        """`LanguageModel.loss_coefs`: those of the routers, if there are experts."""
        experts = self.config.experts
        coefs = {"router_balance": experts.balance_coef, "router_z": experts.z_coef} if experts else {}
        return {name: coef for name, coef in coefs.items() if coef}

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        """`LanguageModel.hidden`."""
        return self.hidden_and_losses(params, tokens, attention_mask, dropout_key=dropout_key)[0]

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """`LanguageModel.hidden_and_losses`."""
        if attention_mask is None:
            segment_ids, positions = None, jnp.arange(tokens.shape[1])[None]
            real, lengths = jnp.ones(tokens.shape, bool), jnp.full_like(positions, tokens.shape[1])
        else:
            segment_ids = attention_mask.astype(jnp.int32)
            positions, lengths = segment_positions(segment_ids), segment_lengths(segment_ids)
            real = segment_ids > 0

        def attend(q, k, v, rule, sinks, cache):
            return self._attention(q, k, v, segment_ids, rule, sinks), cache

        hidden, _, losses = self._run(params, tokens, positions, real, lengths, attend, None, dropout_key)
        return hidden, {name: losses[name] for name in self.loss_coefs}

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`, scaled and capped as the family does."""
        c = self.config
        adapters, params = overlaid(c.lora, params)
        mapped = partial(adapted_linear, c.lora, dtype=hidden.dtype)
        if c.embedding_width is not None:
            hidden = mapped(adapters.get("embedding_out"), hidden, params["embedding_out"]["kernel"])
        kernel = params["token_embedding"]["embedding"].T if c.tie_embeddings else params["lm_head"]["kernel"]
        bias = params["lm_head"]["bias"] if c.head_bias else None
        logits = placed_logits(mapped(adapters.get("lm_head"), hidden, kernel, bias, out_dtype=jnp.float32))
        if c.logit_scale != 1.0:
            logits = logits * c.logit_scale
        return logits if c.logit_softcap is None else c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        """`LanguageModel.apply`."""
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def init_cache(self, batch: int, length: int) -> DecoderCache:
        """`LanguageModel.init_cache`: one slot a token."""
        c = self.config
        scanned = c.execution.scan_layers
        turns = (c.num_layers // c.period,) if scanned else ()
        empty = jnp.zeros((*turns, batch, c.kv_heads, length, c.channels), c.dtype)
        empty = shard(empty, *(None for _ in turns), "attention_batch", "attention_kv_heads", None, None)
        arrays = c.period if scanned else c.num_layers
        return DecoderCache(
            keys=(empty,) * arrays,
            values=(empty,) * arrays,
            key_positions=shard(jnp.full((batch, length), EMPTY), "attention_batch", None),
            positions=shard(jnp.zeros(batch, jnp.int32), "attention_batch"),
            slot=jnp.int32(0),
        )

    def prefill(
        self, params, tokens, attention_mask, cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """`LanguageModel.prefill`: attention among the prompt tokens alone, as in training."""
        segment_ids = attention_mask.astype(jnp.int32)

        def attend(q, k, v, rule, sinks, layer):
            return self._attention(q, k, v, segment_ids, rule, sinks), layer.write(k, v, 0)

        positions = segment_positions(segment_ids)
        written = jnp.where(segment_ids > 0, positions, EMPTY)
        cache = replace(
            cache,
            key_positions=lax.dynamic_update_slice(cache.key_positions, written, (0, 0)),
            positions=jnp.sum(segment_ids, axis=1),
            slot=jnp.full_like(cache.slot, tokens.shape[1]),
        )
        return self._read(params, tokens, positions, segment_lengths(segment_ids), attend, cache)

    def extend(
        self, params, tokens, attention_mask, cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """`LanguageModel.extend`: attention over all slots."""
        hidden, cache = self.read_on(params, tokens, attention_mask, cache)
        return self.logits(params, hidden[:, -1]), cache

    def read_on(
        self, params, tokens, attention_mask, cache: DecoderCache
    ) -> tuple[Float[Array, "B X D"], DecoderCache]:
        """`StateReader.read_on`."""
        last, slots = self.config.max_length - 1, cache.next_slots(attention_mask > 0)
        after_each = cache.positions[:, None] + jnp.cumsum(attention_mask, axis=1)
        positions = jnp.clip(after_each - 1, 0, last)
        written = jnp.where(attention_mask > 0, positions, EMPTY)
        if slots.ndim == 1:
            key_positions = cache.key_positions.at[:, slots].set(written)
        else:
            put = jax.vmap(lambda row, slots, new: row.at[slots].set(new, mode="drop"))
            key_positions = put(cache.key_positions, slots, written)
        distance = positions[:, :, None] - key_positions[:, None]
        visible = (key_positions[:, None] != EMPTY) & (distance >= 0)

        def attend(q, k, v, rule, sinks, layer):
            layer = layer.write(k, v, slots)
            of_one = partial(cached_attention, rule=rule, sinks=sinks)
            of_all = jax.vmap(of_one, in_axes=(1, None, None, 1, 1), out_axes=1)
            keys, values = layer.read()
            return of_all(q, keys, values, visible, distance), layer

        after = replace(
            cache,
            key_positions=key_positions,
            positions=jnp.minimum(after_each[:, -1], last),
            slot=cache.slot + (jnp.sum(attention_mask > 0, axis=1) if cache.slot.ndim else tokens.shape[1]),
        )
        lengths = jnp.broadcast_to(positions[:, -1:] + 1, positions.shape)
        return self._states(params, tokens, positions, lengths, attend, after)

    def step(
        self, params, token: Int[Array, "B"], cache: DecoderCache
    ) -> tuple[Float[Array, "B V"], DecoderCache]:
        """`LanguageModel.step`."""
        if cache.slot.ndim:
            return self.extend(params, token[:, None], jnp.ones((len(token), 1), bool), cache)
        slot, written = cache.slot % cache.key_positions.shape[1], cache.positions[:, None]
        key_positions = lax.dynamic_update_slice(cache.key_positions, written, (0, slot))
        visible, distance = key_positions != EMPTY, written - key_positions

        def attend(q, k, v, rule, sinks, layer):
            layer = layer.write(k, v, slot)
            keys, values = layer.read()
            mixed = cached_attention(q[:, 0], keys, values, visible, distance, rule, sinks)
            return mixed[:, None], layer

        # A row that has ended may wait for a new prompt, and reads on meanwhile.
        positions = jnp.minimum(cache.positions + 1, self.config.max_length - 1)
        after = replace(cache, key_positions=key_positions, positions=positions, slot=cache.slot + 1)
        return self._read(params, token[:, None], written, written + 1, attend, after)

    def _attention(self, q, k, v, segment_ids, rule, sinks) -> Float[Array, "B T H C"]:
        return causal_attention(q, k, v, segment_ids, rule, sinks, self.config.execution.attention)

    def _read(self, params, tokens, positions, lengths, attend: Attend, cache: DecoderCache):
        """Reads tokens into the keys and values of the cache; returns the scores after the last one."""
        hidden, cache = self._states(params, tokens, positions, lengths, attend, cache)
        return self.logits(params, hidden[:, -1]), cache

    def _states(self, params, tokens, positions, lengths, attend: Attend, cache: DecoderCache):
        """Reads tokens into the keys and values of the cache; returns the hidden state of each."""
        real = jnp.ones(tokens.shape, bool)
        hidden, layers, _ = self._run(params, tokens, positions, real, lengths, attend, cache.layers())
        return hidden, replace(
            cache, keys=tuple(x.keys for x in layers), values=tuple(x.values for x in layers)
        )

    def _run(self, params, tokens, positions, real, lengths, attend: Attend, caches, dropout_key=None):
        """Hidden states, the caches after, and the losses of the routers, averaged over the layers."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        adapter, base = overlaid(self.config.lora, params)
        (hidden, caches), written = Network(self.config, attend).apply(
            {"params": base, ADAPTER: adapter},
            tokens,
            positions,
            real,
            lengths,
            caches,
            rngs=rngs,
            mutable=[LOSSES],
        )
        return hidden, caches, _mean_losses(written)


def _mean_losses(written: Any) -> dict[str, Sum]:
    """The losses of every router, [] or, out of a scan, [n] each, averaged."""
    routers = jax.tree.leaves(written, is_leaf=lambda node: "router_z" in node)
    count = sum(router["router_z"].total.size for router in routers)
    mean = lambda *layers: sum(jnp.sum(layer) for layer in layers) / count  # noqa: E731
    return jax.tree.map(mean, *routers) if routers else {}


@partial(jax.jit, static_argnames="model")
def _init(model: Decoder, key: Array) -> Params:
    """Draws the parameters of a list of layers: the numbers do not depend on their arrangement."""
    attend: Attend = lambda q, k, v, rule, sinks, cache: (q, cache)  # noqa: E731
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Network(model.as_list().config, attend).init(key, tokens, tokens, tokens == 0, tokens + 1)
    return dict(variables["params"])
