"""The protocol of models that turn a text into numbers: classifiers, reward models, critics of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.models.base import Params
from hybrid_jax.models.lora import ADAPTER


@runtime_checkable
class SequenceScorer(Protocol):
    """A map from a row of tokens to one number a label, as pure functions over a parameter tree.

    Hashable, so that it can be a static argument of `jax.jit`. What `data.scored_text` encodes, it reads.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the numbers: classes of logits, or what a regression predicts."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int | None:
        """Longest row the scorer can read; None has no bound."""
        ...

    def init(self, key: Array) -> Params: ...

    def cast(self, params: Params) -> Params:
        """The parameters as the computation reads them; see `LanguageModel.cast`."""
        ...

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B Y"]:
        """One number a label, float32. Padding (mask False) changes nothing. Dropout acts only with a key."""
        ...


def check_labels(labels: Sequence[str]) -> None:
    """Raises `ValueError` where they do not tell the numbers apart."""
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be different names, at least one, got {list(labels)}")


def dropped(x: Float[Array, "..."], rate: float, key: Array | None) -> Float[Array, "..."]:
    """Dropout of the features that a head reads; none without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0.0)


def with_head(body: Params, head: Params, *, frozen: bool = False) -> Params:
    """The parameters of a body and of the head that reads it.

    The head lies where it trains (`lora.split`): beside the adapters, where the body has some or is ``frozen``,
    so that it alone trains with them; else beside all else.
    """
    if frozen or ADAPTER in body:
        return {**body, ADAPTER: {**body.get(ADAPTER, {}), **head}}
    return {**body, **head}


def head_of(params: Params, names: Sequence[str]) -> tuple[Params, Params]:
    """The inverse of `with_head`: the body, and of the head the parts with these names that are there."""
    beside = params.get(ADAPTER, {})
    head = {name: part for name, part in {**params, **beside}.items() if name in names}
    body = {name: part for name, part in params.items() if name not in names and name != ADAPTER}
    adapter = {name: part for name, part in beside.items() if name not in names}
    return ({**body, ADAPTER: adapter} if adapter else body), head
