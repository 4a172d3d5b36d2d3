"""A cache of what was said before, mixed into what a model predicts (Grave et al. 2017, arXiv:1612.04426).

    p(w) = (1 − λ) p_model(w) + λ p_cache(w)            p_cache(w) ∝ Σ_{i: x_{i+1} = w} exp(θ h · h_i)

For each of the last ``slots`` tokens the hidden state before it is remembered. A word that was said after a
state like the present one is expected again. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Count, NonNegative, Rate, settings
from hybrid_jax.models.base import (
    BACKBONES,
    LanguageModel,
    RefillCache,
    SlotCache,
    put_rows,
)
from hybrid_jax.models.memory.bank import Bank, masked_weights
from hybrid_jax.models.memory.keeping import has_one_size
from hybrid_jax.models.memory.mixture import Mixture, state_reader


@BACKBONES.register("neural_cache")
@settings
class NeuralCacheSettings:
    """Settings of a model with a cache of its own states: it has the parameters of ``model`` and no others.

    Attributes:
        model: any decoder or recurrent model.
        share: λ, of the cache in what is predicted, as soon as it holds something; 0 is the model by itself.
        scale: θ, on the products of states.
        slots: tokens that are remembered, the last ones.
    """

    model: Annotated[Any, BACKBONES]
    share: Rate = 0.1
    scale: NonNegative = 0.5
    slots: Count = 1000

    def build(self, vocab_size: int | None = None) -> LanguageModel:
        """The model for a tokenizer of ``vocab_size`` tokens.

        Raises:
            UserError: the model gives no hidden states of what it reads into a cache.
        """
        if self.share == 0:
            return self.model.build(vocab_size)
        model = state_reader(self.model, vocab_size, "neural_cache")
        return NeuralCache(replace(self, model=getattr(model, "settings", self.model)), model)


@struct.dataclass
class CachedRows:
    """The cache of the model, the bank, and the last state of each row."""

    inner: Any
    bank: Bank
    last: Float[Array, "B D"]
    begun: Bool[Array, "B"]  # there is a last state

    def take(self, rows: Int[Array, "N"]) -> CachedRows:
        """`Cache.take`."""
        return type(self)(self.inner.take(rows), self.bank.take(rows), self.last[rows], self.begun[rows])

    def with_rows(self, rows: Int[Array, "G M"], fresh: CachedRows) -> CachedRows:
        """`RefillCache.with_rows`."""
        last, begun = put_rows(self.last, rows, fresh.last), put_rows(self.begun, rows, fresh.begun)
        return type(self)(
            self.inner.with_rows(rows, fresh.inner), self.bank.with_rows(rows, fresh.bank), last, begun
        )


@struct.dataclass
class CachedSlots(CachedRows):
    """The same over a `SlotCache`."""

    def grown(self, length: int) -> CachedSlots:
        """`SlotCache.grown`."""
        return CachedSlots(self.inner.grown(length), self.bank, self.last, self.begun)

    def apart(self) -> CachedSlots:
        """`SlotCache.apart`."""
        return CachedSlots(self.inner.apart(), self.bank, self.last, self.begun)


class NeuralCache(Mixture):
    """A model and its cache as a `LanguageModel`."""

    def init_cache(self, batch: int, length: int) -> RefillCache:
        """`LanguageModel.init_cache`."""
        inner = self.model.init_cache(batch, length)
        bank = Bank.empty(batch, self.settings.slots, self.model.width, (), jnp.int32)
        kind = CachedSlots if isinstance(inner, SlotCache) else CachedRows
        return kind(inner, bank, jnp.zeros((batch, self.model.width)), jnp.zeros(batch, bool))

    def extend(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: CachedRows
    ) -> tuple[Float[Array, "B V"], CachedRows]:
        """`LanguageModel.extend`."""
        real = attention_mask > 0
        states, inner = self.model.read_on(params, tokens, real, cache.inner)
        joined = jnp.concatenate([cache.last[:, None], states], axis=1)
        begun = jnp.concatenate([cache.begun[:, None], real], axis=1)
        before = _last_before(begun)[:, 1:]
        keys = jnp.take_along_axis(joined, jnp.maximum(before, 0)[..., None], axis=1)
        bank = cache.bank.written(keys, tokens, real & (before >= 0))
        last = jnp.where(real[:, -1:], states[:, -1], cache.last)
        weights = bank.weights(states[:, -1], self.settings.scale)
        cached = (
            jnp.zeros((len(tokens), self.vocab_size))
            .at[jnp.arange(len(tokens))[:, None], bank.values]
            .add(weights)
        )
        hidden = jnp.concatenate([states[:, -1], cached], axis=-1)
        return self.logits(params, hidden), type(cache)(inner, bank, last, cache.begun | real.any(axis=1))

    def kept(self, cache: CachedRows) -> Any:
        """`Keeper.kept`: all of it; the bank alone where the cache of the model grows."""
        return cache if has_one_size(self.model) else cache.bank

    def resumed(self, kept: Any, cache: CachedRows) -> CachedRows:
        """`Keeper.resumed`: over a model whose cache grows a new text begins, beside the old bank."""
        return replace(cache, bank=kept) if isinstance(kept, Bank) else kept

    def predicted(self, params, states, tokens, segments) -> Float[Array, "B T V"]:
        """`Mixture.predicted`: attention to earlier tokens by the states before them."""
        real = segments > 0
        before = _last_before(real)
        of_before = lambda x: jnp.take_along_axis(x, jnp.maximum(before, 0), axis=1)  # noqa: E731
        pair = real & (before >= 0) & (of_before(segments) == segments)
        keys = jnp.take_along_axis(states, jnp.maximum(before, 0)[..., None], axis=1)
        number = jnp.cumsum(real, axis=1)
        distance = number[:, :, None] - number[:, None]
        visible = pair[:, None] & (segments[:, :, None] == segments[:, None]) & real[:, :, None]
        visible &= (distance >= 0) & (distance < self.settings.slots)
        products = jnp.einsum("btd,bsd->bts", states, lax.stop_gradient(keys))
        weights = masked_weights(products, visible, self.settings.scale)
        return weights @ jax.nn.one_hot(tokens, self.vocab_size)


def _last_before(real: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The index of the last real token before each; -1 where there is none."""
    index = jnp.where(real, jnp.arange(real.shape[1]), -1)
    return jnp.pad(lax.cummax(index, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
