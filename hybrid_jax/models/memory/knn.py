"""A model that looks up what followed states like the present one (Khandelwal et al. 2020, arXiv:1911.00172).

    p(w) = (1 − λ) p_model(w) + λ p_knn(w)        p_knn(w) ∝ Σ_{i nearest: w_i = w} exp(−‖h − h_i‖² / T)

A datastore holds pairs of a hidden state h_i and the token w_i that followed it, of any text that the model has
read; of them the k nearest count. Nothing is trained: the pairs stand beside the parameters, under
"datastore", and stay as they are while the model trains. Here h is what the head reads; the paper takes the
input of the last layer's MLP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Count, Positive, Rate, settings
from hybrid_jax.models.base import BACKBONES, Cache, LanguageModel, Params
from hybrid_jax.models.lora import DATASTORE
from hybrid_jax.models.memory.bank import masked_weights
from hybrid_jax.models.memory.mixture import Mixture, state_reader

_AT_ONCE = 256  # states that look for their neighbours at the same time
_NOTHING = -1  # the token of an entry that holds none


@BACKBONES.register("knn_lm")
@settings
class KnnLMSettings:
    """Settings of a model beside a datastore, which `with_datastore` fills; an empty one changes nothing.

    Attributes:
        model: any decoder or recurrent model.
        entries: pairs that the datastore holds.
        share: λ, of the neighbours in what is predicted; 0 is the model by itself, to the bit.
        neighbours: k, pairs that count, the nearest.
        temperature: T, that squared distances are divided by.
    """

    model: Annotated[Any, BACKBONES]
    entries: Count = 1000
    share: Rate = 0.25
    neighbours: Count = 1024
    temperature: Positive = 1.0

    def build(self, vocab_size: int | None = None) -> LanguageModel:
        """The model for a tokenizer of ``vocab_size`` tokens.

        Raises:
            UserError: the model gives no hidden states of what it reads into a cache.
        """
        model = state_reader(self.model, vocab_size, "knn_lm")
        return KnnLM(replace(self, model=getattr(model, "settings", self.model)), model)


class KnnLM(Mixture):
    """A model and its datastore as a `LanguageModel`; its cache is the model's."""

    def init(self, key: Array) -> Params:
        """The parameters of the model, and a datastore of nothing."""
        entries = self.settings.entries
        keys, values = jnp.zeros((entries, self.model.width)), jnp.full(entries, _NOTHING, jnp.int32)
        return {**self.model.init(key), DATASTORE: {"keys": keys, "values": values}}

    def cast(self, params: Params) -> Params:
        """`LanguageModel.cast`; the datastore stays, where it is among the parameters: what trains has none."""
        store = {DATASTORE: params[DATASTORE]} if DATASTORE in params else {}
        return {**self.model.cast(self.own(params)), **store}

    def own(self, params: Params) -> Params:
        """`Mixture.own`."""
        return _without_datastore(params)

    def predicted(self, params, states, tokens, segments) -> Float[Array, "B T V"]:
        """`Mixture.predicted`."""
        return self._neighbours(params, states)

    def init_cache(self, batch: int, length: int) -> Cache:
        """`LanguageModel.init_cache`."""
        return self.model.init_cache(batch, length)

    def extend(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """`LanguageModel.extend`."""
        states, cache = self.model.read_on(self.own(params), tokens, attention_mask, cache)
        last = states[:, -1]
        return self.logits(params, jnp.concatenate([last, self._neighbours(params, last)], axis=-1)), cache

    def _neighbours(self, params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """p_knn; all 0 of an empty datastore, and where it has no share."""
        shape = (*states.shape[:-1], self.vocab_size)
        if not self.settings.share:
            return jnp.zeros(shape)
        keys, values = (lax.stop_gradient(params[DATASTORE][name]) for name in ("keys", "values"))
        held, count = values != _NOTHING, min(self.settings.neighbours, len(values))
        norms = jnp.where(held, jnp.sum(jnp.square(keys), axis=-1), jnp.inf)

        def one(state: Float[Array, "D"]) -> Float[Array, "V"]:
            # ‖h − k‖² = ‖h‖² − 2 h·k + ‖k‖², of which the first changes no softmax.
            products = jnp.matmul(keys, state, precision=lax.Precision.HIGHEST)
            nearness, index = lax.top_k(2.0 * products - norms, count)
            weights = masked_weights(nearness, held[index], 1.0 / self.settings.temperature)
            return jnp.zeros(self.vocab_size).at[values[index]].add(weights)

        flat = states.reshape(-1, states.shape[-1])
        return lax.map(one, flat, batch_size=_AT_ONCE).reshape(shape)


def _without_datastore(params: Params) -> Params:
    return {name: part for name, part in params.items() if name != DATASTORE}


def pairs(
    model: LanguageModel, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B S D"], Int[Array, "B S"], Bool[Array, "B S"]]:
    """The state behind each token but the last, the token that followed, and where both are; S = T − 1."""
    states = model.hidden(params, tokens, mask)[:, :-1]
    return states.astype(jnp.float32), tokens[:, 1:], mask[:, 1:] & mask[:, :-1]


def with_datastore(
    settings: KnnLMSettings, params: Params, keys: Float[Array, "N D"], values: Int[Array, "N"]
) -> tuple[KnnLMSettings, Params]:
    """The settings and parameters of a model beside these pairs.

    Args:
        settings: whose ``entries`` become N.
        params: of the model, without a datastore or with another one.
        keys: hidden states.
        values: the token that followed each.
    """
    store = {"keys": jnp.asarray(keys, jnp.float32), "values": jnp.asarray(values, jnp.int32)}
    return replace(settings, entries=len(values)), {**_without_datastore(params), DATASTORE: store}
