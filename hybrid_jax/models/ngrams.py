"""A text as the bag of its n-grams: fast, without any order beyond n (fastText, Joulin et al. 2016).

    x = mean over the n-grams g of the row of E[row(g)]          E [V + 2^k, W]

A token is a row of its own; a longer n-gram takes one of the 2^k rows behind those, by a hash of its tokens:
FNV-1a over the tokens as words of 32 bits (Fowler, Noll, Vo), then the finaliser of MurmurHash3, which spreads
what the low bits lack. All of it is uint32 arithmetic on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Interval, MinLen
from jaxtyping import Array, Bool, Float, Int, UInt32

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Order, Width, settings
from hybrid_jax.models.base import BACKBONES, Params

_FNV_START, _FNV_PRIME = 0x811C9DC5, 0x01000193


@BACKBONES.register("ngrams")
@settings
class NGrams:
    """Settings of an `NGramTrunk`.

    Attributes:
        orders: lengths n of the n-grams, ascending.
        bucket_bits: k; n-grams with n > 1 share 2^k rows.
        width: W.
    """

    orders: Annotated[tuple[Order, ...], MinLen(1)] = (1, 2)
    bucket_bits: Annotated[int, Interval(ge=1, le=30)] = 18
    width: Width = 16

    def __post_init__(self):
        if list(self.orders) != sorted(set(self.orders)):
            raise ValueError(f"orders must be ascending numbers, got {list(self.orders)}")

    def build(self, vocab_size: int | None = None) -> NGramTrunk:
        """Makes the trunk over the tokens of a vocabulary."""
        if vocab_size is None:
            raise UserError("the model ngrams needs a tokenizer of a known vocabulary")
        return NGramTrunk(self, vocab_size)


@dataclass(frozen=True)
class NGramTrunk:
    """A `TextTrunk`: the mean over hashed n-grams; it reads rows of any length."""

    config: NGrams
    vocab_size: int

    max_length = None

    @property
    def settings(self) -> NGrams:
        """The settings that build it."""
        return self.config

    @property
    def num_features(self) -> int:
        """F, numbers a text."""
        return self.config.width

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return self.vocab_size + (2**self.config.bucket_bits if self.config.orders[-1] > 1 else 0)

    def init(self, key: Array) -> Params:
        """The table uniform in ±1/W as in fastText."""
        bound = 1.0 / self.config.width
        table = jax.random.uniform(key, (self.num_rows, self.config.width), minval=-bound, maxval=bound)
        return {"ngrams": {"embedding": table}}

    def cast(self, params: Params) -> Params:
        """The same: it computes in float32."""
        return params

    def features(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B W"]:
        """The mean row of the n-grams of each text; 0 for one without any."""
        table = params["ngrams"]["embedding"]
        total, count = jnp.zeros((tokens.shape[0], self.config.width)), jnp.zeros((tokens.shape[0], 1))
        for order in self.config.orders:
            rows, real = self.ngrams(tokens, attention_mask.astype(bool), order)
            total += jnp.sum(jnp.where(real[..., None], table[rows], 0.0), axis=1)
            count += jnp.sum(real, axis=1, keepdims=True)
        return total / jnp.maximum(count, 1)

    def ngrams(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], order: int
    ) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
        """The table rows of the n-grams, N = T − n + 1 (or none), and which of them are real."""
        last = max(tokens.shape[1] - order + 1, 0)
        parts = [tokens[:, i : i + last] for i in range(order)]
        real = jnp.ones((tokens.shape[0], last), bool)
        for i in range(order):
            real &= mask[:, i : i + last]
        if order == 1:
            return parts[0], real
        bucket = hashed(parts) & jnp.uint32(2**self.config.bucket_bits - 1)
        return self.vocab_size + bucket.astype(jnp.int32), real


def hashed(parts: list[Int[Array, "..."]]) -> UInt32[Array, "..."]:
    """One uint32 for each tuple of tokens."""
    h = jnp.full(parts[0].shape, _FNV_START, jnp.uint32)
    for part in parts:
        h = (h ^ part.astype(jnp.uint32)) * jnp.uint32(_FNV_PRIME)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
