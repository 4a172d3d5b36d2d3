"""Memories of what a model has read, to go on from in another call, perhaps of another process.

The memory of a model is its cache: the state of a recurrent model, the slots of a Neural Turing Machine, the
bank of a neural cache. It can be kept where its size does not depend on what was read. A model that keeps a
part of its cache says which (`Keeper`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, OwnCache, Params

Kept = Any  # a pytree of arrays [1 ...]


@runtime_checkable
class Keeper(Protocol):
    """A model that says itself what of its cache is kept."""

    def kept(self, cache: OwnCache) -> Kept:
        """The part of a cache that is kept, of one size whatever was read."""
        ...

    def resumed(self, kept: Kept, cache: OwnCache) -> OwnCache:
        """An empty cache with what was kept."""
        ...


def has_one_size(model: LanguageModel) -> bool:
    """Tells whether the cache is as large for any number of tokens, of which it reads without end."""
    if model.max_length is not None:
        return False
    few, many = (jax.eval_shape(lambda length=length: model.init_cache(1, length)) for length in (2, 64))
    return jax.tree.map(lambda x: x.shape, few) == jax.tree.map(lambda x: x.shape, many)


def check_keeps(model: LanguageModel) -> None:
    """Checks that what a model has read can be kept.

    Raises:
        UserError: its cache grows with what it reads.
    """
    if not (isinstance(model, Keeper) or has_one_size(model)):
        raise UserError(
            f"a memory needs a model whose state has one size, got a {type(model).__name__}, whose cache grows "
            "with what it reads; take a recurrent model, ntm or dnc, or a neural_cache over any model"
        )


def kept_of(model: LanguageModel, cache: OwnCache) -> Kept:
    """The part of a cache that is kept."""
    return model.kept(cache) if isinstance(model, Keeper) else cache


def resumed(model: LanguageModel, memory: Kept, cache: OwnCache) -> OwnCache:
    """An empty cache with what was kept."""
    return model.resumed(memory, cache) if isinstance(model, Keeper) else memory


def nothing_kept(model: LanguageModel) -> Kept:
    """The memory of a row that has read nothing."""
    return kept_of(model, model.init_cache(1, 1))


@dataclass(frozen=True)
class Continued:
    """A model that reads prompts behind what it has read before: the part of a `LanguageModel` that samples.

    Its parameters are ``{"model": …, "memory": …}``; all rows begin with the one row of the memory.
    """

    model: LanguageModel

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        return self.model.vocab_size

    @property
    def max_length(self) -> int | None:
        """The bound of the model."""
        return self.model.max_length

    def cast(self, params: Params) -> Params:
        """`LanguageModel.cast`; the memory stays."""
        return {**params, "model": self.model.cast(params["model"])}

    def init_cache(self, batch: int, length: int) -> OwnCache:
        """`LanguageModel.init_cache`."""
        return self.model.init_cache(batch, length)

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], attention_mask: Bool[Array, "B P"], cache: OwnCache
    ) -> tuple[Float[Array, "B V"], OwnCache]:
        """`LanguageModel.prefill`."""
        memory = jax.tree.map(lambda x: jnp.repeat(x, len(tokens), axis=0), params["memory"])
        return self.model.extend(params["model"], tokens, attention_mask, resumed(self.model, memory, cache))

    def extend(self, params: Params, tokens, attention_mask, cache: OwnCache):
        """`LanguageModel.extend`."""
        return self.model.extend(params["model"], tokens, attention_mask, cache)

    def step(self, params: Params, token: Int[Array, "B"], cache: OwnCache):
        """`LanguageModel.step`."""
        return self.model.step(params["model"], token, cache)

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""
        return self.model.logits(params["model"], hidden)
