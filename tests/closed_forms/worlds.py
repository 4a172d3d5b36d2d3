"""The 27-sequence language model and its three tokens, as components that a config can name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax.numpy as jnp

from hybrid_jax import settings
from hybrid_jax.data.tokenizer import EOS_TOKEN, FastTokenizer
from hybrid_jax.testing import VOCABULARY, PrefixTable


@dataclass(frozen=True)
class WithEnd(PrefixTable):
    """`PrefixTable` with an end token of probability 0, since every tokenizer has one."""

    vocab_size: int = VOCABULARY + 1

    def logits(self, params, hidden):
        """The row of each prefix, and the end token."""
        return _with_end(super().logits(params, hidden))

    def extend(self, params, tokens, attention_mask, cache):
        """`LanguageModel.extend`."""
        logits, cache = super().extend(params, tokens, attention_mask, cache)
        return _with_end(logits), cache

    prefill = extend

    def step(self, params, token, cache):
        """`LanguageModel.step`."""
        logits, cache = super().step(params, token, cache)
        return _with_end(logits), cache


def _with_end(logits):
    return jnp.pad(logits, [*[(0, 0)] * (logits.ndim - 1), (0, 1)], constant_values=-1e9)


@settings
class Enumerated:
    """Three tokens, three steps: 27 responses, and one row of scores for each prefix of one."""

    def build(self, vocab_size: int | None = None) -> PrefixTable:
        """The table of π_ref; a response fills the context, so that none needs to end."""
        return WithEnd()


@settings
class Digits:
    """The letters 0, 1 and 2, and an end token."""

    def build(self, texts: Iterable[str] = ()) -> FastTokenizer:
        """A tokenizer of one token a letter; it reads no texts."""
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

        backend = Tokenizer(models.WordLevel({"0": 0, "1": 1, "2": 2}, unk_token="0"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")  # type: ignore
        backend.add_special_tokens([AddedToken(EOS_TOKEN, special=True)])
        return FastTokenizer(backend, "digits")
