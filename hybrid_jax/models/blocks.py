"""The modules of the decoder: embedding, layers of attention and MLP (or experts), norms.

A layer, ``f`` being attention and then the MLP:   x = x + f(norm(x))            norm_placement "before"
                                                   x = x + norm(f(x))                           "after"
                                                   x = x + norm(f(norm(x)))                     "around"
                                                   x = norm(x + f(x))                           "residual"
In a parallel block both read the layer's input: x = x + attention(norm(x)) + mlp(norm'(x)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.attention.rule import AttentionRule
from hybrid_jax.models.decoder_cache import LayerCache
from hybrid_jax.models.decoder_config import DecoderSettings
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.experts import Dispatch, choose_experts, clamped_swiglu, router_losses
from hybrid_jax.models.layers import ACTIVATIONS, layer_norm, linear, rms_norm
from hybrid_jax.models.lora import ADAPTER, Lora, adapted_linear
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.models.rope import rotary_table, rotate
from hybrid_jax.models.stacking import STACK
from hybrid_jax.parallel.rules import shard, shard_for_use

# (q, k, v, rule, sinks, cache of the layer) -> mixed values, the cache after
Attend = Callable[
    [Array, Array, Array, AttentionRule, Array | None, LayerCache | None], tuple[Array, LayerCache | None]
]
LOSSES = "losses"  # the collection that routers write to
MIXED = "mixed"  # what attention hands to its output map, by the name that ``remat: named`` saves it under


@struct.dataclass
class Context:
    """The facts about the tokens that every layer reads."""

    real: Bool[Array, "B T"]  # False is padding
    rotary: tuple[Array, Array] | None
    local_rotary: tuple[Array, Array] | None  # of the windowed layers


class Network(nn.Module):
    """The whole decoder: embeddings, layers and the norm before the head, tokens to hidden states [B T D]."""

    config: DecoderSettings
    attend: Attend

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        real: Bool[Array, "B T"],
        lengths: Int[Array, "B T"],
        caches: list[LayerCache] | None = None,
    ):
        """``lengths`` counts the tokens of each token's sequence so far, padding not counted."""
        c = self.config
        x = Embedding(c.vocab_size, c.embedding_width or c.width, c, name="token_embedding")(tokens)
        if c.embedding_scale != 1.0:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        if c.embedding_width is not None:
            x = Linear(c.width, False, c.init_std, c.dtype, lora=c.lora, name="embedding_in")(x)
        if c.position == "learned":
            rows = c.max_length + c.position_offset
            x = x + Embedding(rows, c.width, c, name="position_embedding")(positions + c.position_offset)
        if c.embedding_norm:
            x = Norm(c, name="embedding_norm")(x)
        x = shard(_dropout(self, c)(x), "batch", "length", "width")
        run = self._scan if c.execution.scan_layers else self._run
        x, caches = run(x, _context(c, positions, real, lengths), caches)
        if self.is_initializing():
            self._init_head(x)
        return Norm(c, name="final_norm")(x) if c.final_norm else x, caches

    def _run(self, x, context: Context, caches: list[LayerCache] | None):
        return _layers(self.config, self.attend, self.config.num_layers, x, context, caches)

    def _scan(self, x, context: Context, caches: list[LayerCache] | None):
        """The caches are carried, not scanned over: so each is written in place."""
        stack = nn.scan(
            Turn,
            variable_axes={"params": 0, ADAPTER: 0, LOSSES: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=self.config.num_layers // self.config.period,
        )(self.config, self.attend, name=STACK)
        (x, caches, _), _ = stack((x, caches, jnp.int32(0)), context)
        return x, caches

    def _init_head(self, x) -> None:
        """`Decoder.logits` reads these."""
        c = self.config
        if c.embedding_width is not None:
            Linear(c.embedding_width, False, c.init_std, c.dtype, name="embedding_out")(x)
        if not c.tie_embeddings:
            Linear(c.vocab_size, c.head_bias, c.init_std, c.dtype, name="lm_head")(x)
        elif c.head_bias:
            self.param("lm_head", lambda key: {"bias": jnp.zeros(c.vocab_size or 0)})


def _context(c: DecoderSettings, positions, real, lengths) -> Context:
    if c.position != "rotary":
        return Context(real, None, None)
    table = rotary_table(positions, c.rotary_channels, c.rope_theta, c.rope_scaling, lengths)
    if c.local_rope_theta is None:
        return Context(real, table, table)
    return Context(real, table, rotary_table(positions, c.rotary_channels, c.local_rope_theta))


class Turn(nn.Module):
    """The layers of one turn of the scan."""

    config: DecoderSettings
    attend: Attend

    @nn.compact
    def __call__(self, carry, context: Context):
        c = self.config
        x, stacks, turn = carry
        caches = None if stacks is None else [replace(stack, turn=turn) for stack in stacks]
        x, caches = _layers(c, self.attend, c.period, x, context, caches)
        stacks = None if caches is None else [replace(cache, turn=None) for cache in caches]
        return (x, stacks, turn + 1), None


def _layers(
    c: DecoderSettings, attend: Attend, count: int, x, context: Context, caches: list[LayerCache] | None
):
    """``count`` layers, one after the other, within the module that calls."""
    layer, written = _checkpointed(c.execution), []
    for i in range(count):
        x, cache = layer(c, i, attend, name=f"layer_{i}")(x, context, None if caches is None else caches[i])
        x = shard(x, "batch", "length", "width")
        written.append(cache)
    return x, None if caches is None else written


def _checkpointed(execution: Execution) -> Any:
    """The layer module; its backward pass recomputes what ``remat`` does not save."""
    policies = jax.checkpoint_policies
    policy = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "named": policies.save_only_these_names(MIXED),
    }
    if execution.remat == "none":
        return Layer
    # Within a scan nothing could be merged with the forward pass, so no barrier against that is needed.
    return nn.remat(Layer, policy=policy[execution.remat], prevent_cse=not execution.scan_layers)


def _dropout(module: nn.Module, c: DecoderSettings) -> nn.Dropout:
    return nn.Dropout(c.dropout, deterministic=c.dropout == 0.0 or not module.has_rng("dropout"))


class Layer(nn.Module):
    """One layer: attention and an MLP or a mixture, each a branch that is added to ``x``."""

    config: DecoderSettings
    index: int
    attend: Attend

    @nn.compact
    def __call__(self, x, context: Context, cache: LayerCache | None):
        c, drop = self.config, _dropout(self, self.config)
        attention = Attention(c, self.index, self.attend, name="attention")
        mlp = Mixture(c, name="mlp") if c.has_experts(self.index) else Mlp(c, c.inner_width, name="mlp")
        before = c.norm_placement in ("before", "around")
        after = c.norm_placement in ("after", "around")

        def read(x, name):
            return Norm(c, name=f"{name}_norm")(x) if before else x

        def add(x, branch, name):
            if after:
                branch = Norm(c, name=f"{name}_output_norm")(branch)
            x = x + drop(branch if c.residual_scale == 1.0 else branch * c.residual_scale)
            return Norm(c, name=f"{name}_norm")(x) if c.norm_placement == "residual" else x

        seen = read(x, "attention")
        mixed, cache = attention(seen, context, cache)
        if c.block == "sequential":
            x = add(x, mixed, "attention")
            return add(x, mlp(read(x, "mlp"), context), "mlp"), cache
        thought = mlp(seen if c.block == "parallel_shared" else read(x, "mlp"), context)
        return add(add(x, mixed, "attention"), thought, "mlp"), cache


class Attention(nn.Module):
    """Multi-head attention: projections, positions, `attend`, and the output map."""

    config: DecoderSettings
    index: int
    attend: Attend

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None):
        c = self.config
        q, k, v = (self._project(x, name, n) for name, n in self._heads().items())
        if c.query_key_norm is not None:
            q, k = (HeadNorm(c, name=name)(y) for name, y in (("query_norm", q), ("key_norm", k)))
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, k, v))
        if c.is_rotary(self.index):
            table = context.local_rotary if c.is_windowed(self.index) else context.rotary
            assert table is not None
            q, k = (rotate(y, table, interleaved=c.rotary_interleaved) for y in (q, k))
        sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,)) if c.attention_sinks else None
        mixed, cache = self.attend(q, k, v, c.attention_rule(self.index), sinks, cache)
        mixed = checkpoint_name(shard(mixed, "attention_batch", "length", "attention_heads", None), MIXED)
        bias = c.attention_bias if c.output_bias is None else c.output_bias
        out = Linear(c.width, bias, residual_std(c), c.dtype, lora=c.lora, name="output")
        return out(shard(rearrange(mixed, "b t h c -> b t (h c)"), "batch", "length", "heads")), cache

    def _heads(self) -> dict[str, int]:
        c = self.config
        return {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}

    def _project(self, x, name: str, heads: int) -> Float[Array, "B T H C"]:
        c = self.config
        y = Linear(heads * c.channels, c.attention_bias, c.init_std, c.dtype, lora=c.lora, name=name)(x)
        # First where the weights lie, then where attention wants it: else the weights would travel.
        y = shard(y, "batch", "length", "heads" if name == "query" else "kv_heads")
        role = "attention_heads" if name == "query" else "attention_kv_heads"
        return shard(rearrange(y, "b t (h c) -> b t h c", h=heads), "attention_batch", "length", role, None)


class Mlp(nn.Module):
    """An MLP of one hidden layer, plain or gated."""

    config: DecoderSettings
    inner_width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context):
        c = self.config
        inner = partial(Linear, self.inner_width, c.mlp_bias, c.init_std, c.dtype, lora=c.lora)
        activate, up = ACTIVATIONS[c.activation], inner(name="up")(x)
        x = activate(inner(name="gate")(x)) * up if c.mlp == "gated" else activate(up)
        x = shard(x, "batch", "length", "mlp")
        return Linear(c.width, c.mlp_bias, residual_std(c), c.dtype, lora=c.lora, name="down")(x)


class Mixture(nn.Module):
    """Gated MLPs of which a router chooses some for every token."""

    config: DecoderSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context):
        c, e = self.config, self.config.experts
        assert e is not None
        flat = x.reshape(-1, c.width)
        router = Linear(e.count, e.router_bias, c.init_std, c.dtype, jnp.float32, c.lora, name="router")
        scores = router(flat)
        weights, chosen = choose_experts(scores, e.per_token, e.normalize)
        if not self.is_initializing():
            by_row = x.shape[:2]
            losses = router_losses(scores.reshape(*by_row, -1), chosen.reshape(*by_row, -1), context.real)
            self.sow(LOSSES, "router_losses", losses)
        y = self._experts(flat, weights, chosen).astype(x.dtype).reshape(x.shape)
        if e.shared_width is not None:
            shared = Mlp(c, e.shared_width, name="shared")(x, context)
            if e.shared_gate:
                gate = Linear(1, False, c.init_std, c.dtype, lora=c.lora, name="shared_gate")
                shared = shared * nn.sigmoid(gate(x))
            y = y + shared
        return y

    def _experts(self, x, weights, chosen) -> Float[Array, "N D"]:
        c, e = self.config, self.config.experts
        assert e is not None
        dispatch = Dispatch.of(chosen, e.count)

        def product(name: str, x, width: int, std: float):
            kernel, bias = Stack((e.count, x.shape[1], width), e.bias, std, name=name)()
            return dispatch.product(x, kernel.astype(x.dtype), bias)

        copies = dispatch.scatter(x)
        gate, up = (product(f"expert_{name}", copies, e.width, c.init_std) for name in ("gate", "up"))
        inner = clamped_swiglu(gate, up) if e.clamped else ACTIVATIONS[c.activation](gate) * up
        return dispatch.gather(product("expert_down", inner, c.width, residual_std(c)), weights)


def residual_std(config: DecoderSettings) -> float:
    """GPT-2 shrinks what writes into the residual stream by √(number of residual branches)."""
    return config.init_std / math.sqrt(2 * config.num_layers)


class Linear(nn.Module):
    """A linear map with its bias and adapter, if it has them."""

    features: int | None
    use_bias: bool
    init_std: float
    dtype: str
    out_dtype: Any = None
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        types = {"dtype": self.dtype, "out_dtype": self.out_dtype}
        if self.lora is None or not self.has_variable(ADAPTER, "a"):
            return adapted_linear(None, None, x, kernel, bias, **types)
        rate = self.lora.dropout
        drop = nn.Dropout(rate, deterministic=rate == 0.0 or not self.has_rng("dropout"))
        return adapted_linear(self.lora, self.variables[ADAPTER], x, kernel, bias, **types, drop=drop)


class Stack(nn.Module):
    """The kernels and biases of a stack of linear maps."""

    shape: tuple[int, int, int]
    use_bias: bool
    init_std: float

    @nn.compact
    def __call__(self):
        count, _, features = self.shape
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), self.shape)
        return kernel, self.param("bias", nn.initializers.zeros, (count, features)) if self.use_bias else None


class Norm(nn.Module):
    """A layer norm or an RMS norm, computed in float32."""

    config: DecoderSettings

    @nn.compact
    def __call__(self, x):
        return normalize(self, self.config, x, (x.shape[-1],), self.config.norm_bias)


class HeadNorm(nn.Module):
    """The norm of queries or keys, over the channels of each head or over all of them."""

    config: DecoderSettings

    @nn.compact
    def __call__(self, x: Float[Array, "B T H C"]):
        c, bias = self.config, self.config.has_query_key_norm_bias
        if c.query_key_norm == "all_heads":
            flat = x.reshape(*x.shape[:2], -1)
            return normalize(self, c, flat, flat.shape[2:], bias).reshape(x.shape)
        return normalize(self, c, x, x.shape[3:] if c.query_key_norm == "head" else x.shape[2:], bias)


def normalize(module: nn.Module, c: DecoderSettings, x, shape: tuple[int, ...], use_bias: bool):
    """Layer or RMS norm over the last axis with the scale, and the bias, that the module keeps."""
    one = nn.initializers.zeros if c.norm_unit_offset else nn.initializers.ones
    scale = module.param("scale", one, shape) if c.norm_scale else jnp.ones(shape)
    scale = 1.0 + scale if c.norm_unit_offset else scale
    flat = scale if len(shape) == 1 else jnp.ones(shape[-1:])
    if c.norm == "rms":
        y = rms_norm(x, flat, c.norm_epsilon)
    else:
        has_bias = use_bias and c.norm_scale
        bias = module.param("bias", nn.initializers.zeros, shape) if has_bias else jnp.zeros(shape[-1:])
        y = layer_norm(x, flat, bias, c.norm_epsilon)
    return y if len(shape) == 1 else (y * scale).astype(x.dtype)


class Embedding(nn.Module):
    """An embedding: a table [rows D], of tokens or of positions."""

    rows: int | None
    width: int
    config: DecoderSettings

    @nn.compact
    def __call__(self, indices):
        c = self.config
        table = self.param("embedding", nn.initializers.normal(c.init_std), (self.rows, self.width))
        # Whole, so that each device finds what its own tokens need; one token a row would not be worth it.
        kept = param_axes(f"{self.name}/embedding", table.shape)
        used = (None if indices.shape[1] > 1 else "vocab", None)
        rows: Any = shard_for_use(table.astype(c.dtype), kept, used)
        x = jnp.take(rows, indices, axis=0)
        if c.lora is None or not self.has_variable(ADAPTER, "a"):
            return x
        a, b = (self.variables[ADAPTER][name].astype(c.dtype) for name in ("a", "b"))
        learnt = linear(jnp.take(a, indices, axis=0), b, out_dtype=jnp.float32)
        return (x + c.lora.scale * learnt).astype(x.dtype)
