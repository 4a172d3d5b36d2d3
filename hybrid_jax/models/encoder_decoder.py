"""One configurable encoder-decoder: T5 in its versions is settings of it.

The encoder reads a source, the decoder a target, token by token, and at each layer the encoder's states.
As a `LanguageModel` it reads rows [source | target], with masks that tell the two apart:

    segment      1  1  1  2  2  2  3  3  4  4  0       odd numbers are sources, the even ones after them targets
    encoder      a  b  c  .  .  .  p  q  .  .  .
    decoder      .  .  ^  x  y  z  .  ^  u  v  .       ^ is the start token, in the place before the target
    scores of    .  .  x  y  z  .  .  u  v  .  .       as of every language model: item t scores token t + 1
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES, ModelOutput, Params
from hybrid_jax.models.encoder_blocks import masked_attention
from hybrid_jax.models.encoder_decoder_blocks import Attend, Network
from hybrid_jax.models.encoder_decoder_config import EncoderDecoderSettings
from hybrid_jax.models.layers import linear
from hybrid_jax.models.vocabulary import embedding_rows


@struct.dataclass
class EncoderDecoderCache:
    """Keys and values of the source, made once, and of the target's tokens so far; one pair a layer."""

    written: tuple[tuple[Float[Array, "B R H C"], Float[Array, "B R H C"]], ...]
    source: tuple[tuple[Float[Array, "B P H C"], Float[Array, "B P H C"]], ...]  # empty before `prefill`
    source_mask: Bool[Array, "B P"]
    slot: Int[Array, "B"]  # of the next token

    def take(self, rows: Int[Array, "N"]) -> EncoderDecoderCache:
        """`Cache.take`."""
        return jax.tree.map(lambda x: x[rows], self)


@BACKBONES.register("encoder_decoder")
@settings
class EncoderDecoderConfig(EncoderDecoderSettings):
    """The encoder-decoder, and how it is built. ``None`` means the usual choice, named behind it."""

    def build(self, vocab_size: int | None = None) -> EncoderDecoder:
        """The model for a tokenizer of ``vocab_size`` tokens; an own ``vocab_size`` may be larger."""
        return EncoderDecoder(replace(self, vocab_size=embedding_rows(self.vocab_size, vocab_size)))


@dataclass(frozen=True)
class EncoderDecoder:
    """The encoder-decoder as a `LanguageModel`: hashable, so that it can be a static argument of `jax.jit`.

    In `hidden`, `hidden_and_losses` and `apply`, ``attention_mask`` is int and numbers sources and targets as
    above; without it nobody knows where a source ends. States and scores outside of targets, and of the place
    before each, mean nothing. A row costs what two rows of a decoder of its length cost.
    """

    config: EncoderDecoderConfig

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
    def max_length(self) -> int | None:
        """None: relative positions have no bound."""
        return None

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Empty: the model has no losses of its own."""
        return {}

    def init(self, key: Array) -> Params:
        """Random parameters, float32."""
        return _init(self.config, key)

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        """Item t predicts token t + 1.

        Raises:
            UserError: the mask does not number sources and targets.
        """
        if attention_mask is None or attention_mask.dtype == bool:
            raise UserError(
                "an encoder-decoder must know where each source ends: it needs a mask that numbers sources and "
                "targets (1 and 2, 3 and 4, ...), got one of real tokens; train it by supervised fine-tuning"
            )
        is_target = (attention_mask > 0) & (attention_mask % 2 == 0)
        sources = jnp.where(is_target, 0, attention_mask)
        following = jnp.pad(jnp.where(is_target, attention_mask, 0)[:, 1:], ((0, 0), (0, 1)))
        targets = jnp.where(is_target, attention_mask, following)
        inputs = jnp.where(is_target, tokens, self.config.start_id)
        return self._read_pairs(params, tokens, sources, inputs, targets, dropout_key)

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """`hidden`, and no losses."""
        return self.hidden(params, tokens, attention_mask, dropout_key=dropout_key), {}

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""
        c = self.config
        if c.scale_outputs:
            hidden = hidden * jnp.asarray(c.width**-0.5, hidden.dtype)
        kernel = params["token_embedding"]["embedding"].T if c.tie_embeddings else params["lm_head"]["kernel"]
        return linear(hidden, kernel.astype(hidden.dtype), None, out_dtype=jnp.float32)

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        """`hidden` and the `logits` of all positions."""
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def apply_pairs(
        self,
        params: Params,
        source: Int[Array, "B P"],
        source_mask: Bool[Array, "B P"],
        target: Int[Array, "B R"],
        target_mask: Bool[Array, "B R"],
        *,
        dropout_key: Array | None = None,
    ) -> ModelOutput:
        """Sources and targets apart, padded on either side: item t scores target token t, given those before.

        What `apply` computes on rows, in less time where all sources are of about one length.
        """
        starts = jnp.pad(target_mask[:, :-1], ((0, 0), (1, 0))) < target_mask
        before = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))
        inputs = jnp.where(starts, self.config.start_id, before)
        sources, targets = source_mask.astype(jnp.int32), 2 * target_mask.astype(jnp.int32)
        hidden = self._read_pairs(params, source, sources, inputs, targets, dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def cast(self, params: Params) -> Params:
        """The parameters as they are: each is cast where it is used."""
        return params

    def init_cache(self, batch: int, length: int) -> EncoderDecoderCache:
        """`LanguageModel.init_cache`."""
        c = self.config
        empty = jnp.zeros((batch, length, c.num_heads, c.channels), c.dtype)
        mask = jnp.zeros((batch, 0), bool)
        return EncoderDecoderCache(((empty, empty),) * c.decoder_layers, (), mask, jnp.zeros(batch, jnp.int32))

    def prefill(
        self, params, tokens, attention_mask, cache: EncoderDecoderCache
    ) -> tuple[Float[Array, "B V"], EncoderDecoderCache]:
        """Encodes the prompts and decodes the start token."""
        batch, length = tokens.shape
        mask = attention_mask.astype(bool)
        memory = self._encode(params, tokens, mask.astype(jnp.int32))

        def cross(q, x, project, bias, drop):
            keys, values = project(memory)
            return masked_attention(q, keys, values, mask[:, None, None]), (keys, values)

        # A row of ``length`` prompt tokens leaves the others, and the start token, to the decoder.
        written = jax.tree.map(lambda array: array[:, : array.shape[1] - length + 1], cache.written)
        cache = replace(cache, written=written, source_mask=mask)
        start = jnp.full(batch, self.config.start_id, jnp.int32)
        return self._step(params, start, cache, [cross] * self.config.decoder_layers)

    def step(
        self, params, token: Int[Array, "B"], cache: EncoderDecoderCache
    ) -> tuple[Float[Array, "B V"], EncoderDecoderCache]:
        """`LanguageModel.step`: one more token of the target."""

        def cross(q, x, project, bias, drop, pair):
            keys, values = pair
            return masked_attention(q, keys, values, cache.source_mask[:, None, None]), pair

        return self._step(params, token, cache, [partial(cross, pair=pair) for pair in cache.source])

    def extend(
        self, params, tokens, attention_mask, cache: EncoderDecoderCache
    ) -> tuple[Float[Array, "B V"], EncoderDecoderCache]:
        """`LanguageModel.extend`: of an empty cache the source, then tokens of the target, one by one."""
        if not cache.source:
            return self.prefill(params, tokens, attention_mask, cache)

        def read(carry, inputs):
            _, cache = carry
            token, real = inputs
            logits, after = self.step(params, token, cache)
            return (logits, replace(after, slot=jnp.where(real, after.slot, cache.slot))), None

        none = jnp.zeros((len(tokens), self.vocab_size))
        return lax.scan(read, (none, cache), (tokens.T, attention_mask.T))[0]

    def _step(self, params, token, cache: EncoderDecoderCache, crosses: list[Attend]):
        slots = jnp.arange(cache.written[0][0].shape[1])
        distance = slots - cache.slot[:, None, None]
        write = jax.vmap(lambda old, new, slot: lax.dynamic_update_slice(old, new, (slot, 0, 0)))

        def attend(q, x, project, bias, drop, pair):
            keys, values = (write(old, new, cache.slot) for old, new in zip(pair, project(x), strict=True))
            visible = (distance <= 0)[:, None]
            return masked_attention(q, keys, values, visible, bias=bias), (keys, values)

        attends = [partial(attend, pair=pair) for pair in cache.written]
        layers = list(zip(attends, crosses, strict=True))
        hidden, kept = self._run(params, "decode", token[:, None], distance, layers)
        written, source = zip(*kept, strict=True)
        return self.logits(params, hidden[:, 0]), replace(
            cache, written=written, source=source, slot=cache.slot + 1
        )

    def _read_pairs(self, params, source, sources, inputs, targets, dropout_key) -> Float[Array, "B R D"]:
        """Target ``2k`` attends to itself, causally, and to source ``2k − 1``."""
        encoder_key, decoder_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        memory = self._encode(params, source, sources, encoder_key)
        length = inputs.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        own = ((targets[:, :, None] == targets[:, None, :]) & causal)[:, None]
        its = (targets[:, :, None] - 1 == sources[:, None, :])[:, None]
        layers = [(_attend(own), _attend(its, memory))] * self.config.decoder_layers
        return self._run(params, "decode", inputs, _distances(length), layers, key=decoder_key)[0]

    def _encode(self, params, tokens, sources, key=None) -> Float[Array, "B S D"]:
        visible = (sources[:, :, None] == sources[:, None, :])[:, None]
        return self._run(params, "encode", tokens, _distances(tokens.shape[1]), _attend(visible), key=key)

    def _run(self, params, method: str, *inputs, key=None) -> Any:
        rngs = None if key is None else {"dropout": key}
        return Network(self.config).apply({"params": params}, *inputs, rngs=rngs, method=method)


def _distances(length: int) -> Int[Array, "1 T T"]:
    """Key position less query position: within a segment, wherever in the row it lies, they are the same."""
    return (jnp.arange(length) - jnp.arange(length)[:, None])[None]


def _attend(visible: Bool[Array, "B 1 T S"], memory: Array | None = None) -> Attend:
    """To the visible positions of the row itself, or of the encoder's states."""

    def attend(q, x, project, bias, drop):
        keys, values = project(x if memory is None else memory)
        return masked_attention(q, keys, values, visible, bias=bias, drop=drop), None

    return attend


@partial(jax.jit, static_argnames="config")
def _init(config: EncoderDecoderConfig, key: Array) -> Params:
    def attend(q, x, project, bias, drop):
        project(x)
        return q, None

    return dict(Network(config).init(key, jnp.zeros((1, 1), jnp.int32), attend, attend)["params"])
