"""The one protocol behind every backbone: decoder, recurrent, memory, Markov."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.registry import Registry

Params = dict[str, Any]  # a nested dict of arrays


# Every entry has ``build(vocab_size: int | None) -> LanguageModel``; None keeps the size named by itself.
BACKBONES: Registry = Registry("backbone", needs=("build",))


CacheT = TypeVar("CacheT")


@runtime_checkable
class Cache(Protocol):
    """The memory that a model has of some rows: keys and values, a hidden state, or the last k tokens.

    A pytree. Row ``b`` is what `LanguageModel.init_cache` made for row ``b`` of the batch, wherever the axis of
    the rows lies in the arrays inside: only the cache itself needs to know that.
    """

    def take(self: CacheT, rows: Int[Array, "N"]) -> CacheT:
        """The cache of ``rows`` in that order: some left out, some more than once."""
        ...


@runtime_checkable
class RefillCache(Cache, Protocol):
    """A cache whose rows can read new sequences while the others go on."""

    def with_rows(self: CacheT, rows: Int[Array, "G M"], fresh: CacheT) -> CacheT:
        """With some rows given over to new sequences.

        Args:
            rows: where each row of ``fresh`` goes within each of G equal groups of the rows, the cache's and
                those of ``fresh``; what is no row of its group is left out.
            fresh: of G · M rows, made for as many tokens as this cache, after `LanguageModel.prefill`.
        """
        ...


@runtime_checkable
class SlotCache(RefillCache, Protocol):
    """A cache with a slot for every token, all rows writing the same one; behind the last comes the first."""

    def grown(self: CacheT, length: int) -> CacheT:
        """With empty slots behind the others, ``length`` in all; only before any slot is written twice."""
        ...

    def apart(self: CacheT) -> CacheT:
        """With rows that write slots of their own from now on: one that reads nothing keeps all it has read.

        What a row has read then lies in the same slots whatever others read, so that its numbers do not depend
        on them, not by a bit.
        """
        ...


OwnCache = Any  # the `Cache` of one model, which reads no other


@struct.dataclass
class RowCache:
    """A cache whose arrays all begin with the axis of the rows: a hidden state, a memory, the last k tokens."""

    state: Any  # a pytree of arrays [B ...]

    def take(self, rows: Int[Array, "N"]) -> RowCache:
        """`Cache.take`."""
        return RowCache(jax.tree.map(lambda x: x[rows], self.state))

    def with_rows(self, rows: Int[Array, "G M"], fresh: RowCache) -> RowCache:
        """`RefillCache.with_rows`."""
        return RowCache(jax.tree.map(lambda x, new: put_rows(x, rows, new), self.state, fresh.state))


def put_rows(array: Shaped[Array, "B ..."], rows: Int[Array, "G M"], new: Any) -> Shaped[Array, "B ..."]:
    """``array`` with the rows of ``new`` at ``rows`` of each of G equal groups; others are left out.

    A group is what one device holds, so that no row moves to another device.
    """
    groups = len(rows)
    split = lambda x: x.reshape(groups, -1, *x.shape[1:])  # noqa: E731
    put = jax.vmap(lambda group, index, value: group.at[index].set(value, mode="drop"))
    return put(split(array), rows, split(new)).reshape(array.shape)


@struct.dataclass
class ModelOutput:
    """The result of `LanguageModel.apply`."""

    logits: Float[Array, "B T V"]  # float32; item t scores token t + 1
    hidden: Float[Array, "B T D"]  # what the heads read


@runtime_checkable
class LanguageModel(Protocol):
    """A language model as pure functions over a parameter tree.

    ``attention_mask`` is bool (True is a token) or int: then it numbers the packed sequences of a row and 0
    is padding. A token sees the tokens of its own segment up to itself, and positions count from the start
    of the segment, so left padding changes nothing. ``None`` means that every token is real. Only an
    `EncoderDecoder` reads the numbers differently: it takes pairs of them as a source and its target.
    """

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        ...

    @property
    def width(self) -> int:
        """Channels of a hidden state, D."""
        ...

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model can read; None has no bound."""
        ...

    def init(self, key: Array) -> Params:
        """Random parameters, float32."""
        ...

    def cast(self, params: Params) -> Params:
        """The parameters as the computation reads them: for a frozen or a short-lived copy in less memory.

        A computation from it gives the same bits; only optimizers need the float32 of ``params``.
        """
        ...

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states (after the last norm). Dropout acts only where a key is given."""
        ...

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Weights of the model's own losses in training, such as a router's; empty for most models."""
        ...

    def hidden_and_losses(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """`hidden`, with the losses that `loss_coefs` names, as sums over the real tokens."""
        ...

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token scores, float32: only for the positions that are wanted."""
        ...

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> ModelOutput:
        """`hidden` and the `logits` of all positions."""
        ...

    def init_cache(self, batch: int, length: int) -> OwnCache:
        """An empty cache for ``batch`` rows of at most ``length`` tokens."""
        ...

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], attention_mask: Bool[Array, "B P"], cache: OwnCache
    ) -> tuple[Float[Array, "B V"], OwnCache]:
        """Reads left-padded prompts into the empty cache; returns the scores of the first response token.

        It is `extend` of an empty cache, up to rounding.
        """
        ...

    def extend(
        self, params: Params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: OwnCache
    ) -> tuple[Float[Array, "B V"], OwnCache]:
        """Reads more tokens behind those in the cache, such as a user's turn; returns the scores after them.

        They are left-padded, too: a row may read fewer than others. The scores of a row that reads none mean
        nothing. An `EncoderDecoder` reads its source first, and more of the target from then on.
        """
        ...

    def step(
        self, params: Params, token: Int[Array, "B"], cache: OwnCache
    ) -> tuple[Float[Array, "B V"], OwnCache]:
        """Reads one token a row; returns the scores of the next one."""
        ...


@runtime_checkable
class StateReader(LanguageModel, Protocol):
    """A language model that also gives the hidden states of what it reads into a cache."""

    def read_on(
        self, params: Params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: OwnCache
    ) -> tuple[Float[Array, "B X D"], OwnCache]:
        """`LanguageModel.extend` with the hidden state of each token in place of the scores after the last."""
        ...
