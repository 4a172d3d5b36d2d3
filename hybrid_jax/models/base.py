"""The one protocol behind every backbone: decoder, recurrent, memory, Markov."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.registry import Registry

Params = dict[str, Any]  # a nested dict of arrays
Cache = Any  # a pytree: keys and values, a hidden state, a memory, or the last k tokens


# Every entry has ``build(vocab_size: int | None) -> LanguageModel``; None keeps the size named by itself.
BACKBONES: Registry = Registry("backbone")


CacheT = TypeVar("CacheT")


@runtime_checkable
class SlotCache(Protocol):
    """A cache with a slot for every token, all rows writing the same one; behind the last comes the first."""

    def grown(self: CacheT, length: int) -> CacheT:
        """With empty slots behind the others, ``length`` in all; only before any slot is written twice."""
        ...

    def with_rows(self: CacheT, rows: Int[Array, "G M"], fresh: CacheT) -> CacheT:
        """With some rows given over to new prompts.

        Args:
            rows: where each row of ``fresh`` goes within each of G equal groups of the rows, the cache's and
                those of ``fresh``; what is no row of its group is left out.
            fresh: of G · M rows and as many slots as this cache, after `LanguageModel.prefill`.
        """
        ...


@struct.dataclass
class ModelOutput:
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
    def vocab_size(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model can read; None has no bound."""
        ...

    def init(self, key: Array) -> Params: ...

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
    ) -> ModelOutput: ...

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for ``batch`` rows of at most ``length`` tokens."""
        ...

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], attention_mask: Bool[Array, "B P"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads left-padded prompts into the empty cache; returns the scores of the first response token."""
        ...

    def step(self, params: Params, token: Int[Array, "B"], cache: Cache) -> tuple[Float[Array, "B V"], Cache]:
        """Reads one token a row; returns the scores of the next one."""
        ...
