"""The 27-sequence language model and its three tokens, as components that a config can name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax import OrderK, RecurrentModel, RowCache, settings
from hybrid_jax.data.tokenizer import EOS_TOKEN, FastTokenizer
from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mamba2 import Mamba2
from hybrid_jax.testing import START, STEPS, TRANSITION, VOCABULARY, PrefixTable


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


@dataclass(frozen=True)
class Endless(RecurrentModel):
    """A recurrent model whose end token has probability 0."""

    def logits(self, params, hidden):
        """All scores but that of the end token, the last."""
        return super().logits(params, hidden).at[..., -1].set(-1e9)


@settings
class Remembering(LSTM):
    """An LSTM over the three tokens."""

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model, which never ends before its three tokens."""
        return Endless(self.sized(vocab_size))


@settings
class InChunks(Mamba2):
    """A Mamba-2 over the three tokens."""

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model, which never ends before its three tokens."""
        return Endless(self.sized(vocab_size))


@settings
class Computer(DNC):
    """A differentiable neural computer over the three tokens."""

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model, which never ends before its three tokens."""
        return Endless(self.sized(vocab_size))


@dataclass(frozen=True)
class OneBack(OrderK):
    """A row of scores for each token before, and one for the prompt, the token 3; the end is the token 4."""

    vocab_size: int = VOCABULARY + 2
    width: int = VOCABULARY + 1
    order: int = 1

    def init(self, key):
        """The rows of π_ref."""
        return {"table": jnp.log(jnp.asarray([*TRANSITION, START], jnp.float32))}

    def of_windows(self, params, windows, mask, key=None):
        """The token before, one-hot."""
        return jax.nn.one_hot(windows[:, -1], self.width), {}

    def logits(self, params, hidden):
        """The row of the token before; 3 and 4 have probability 0."""
        return _with_end(_with_end(hidden @ params["table"]))


@settings
class Chain:
    """A Markov chain of order 1 over the three tokens."""

    def build(self, vocab_size: int | None = None) -> OneBack:
        """The chain of π_ref."""
        return OneBack()


@settings
class Returns:
    """1 for a response whose third token is its first."""

    def score_tokens(self, tokens, attention_mask, response_mask):
        """`DeviceReward.score_tokens`."""
        return (tokens[:, -1] == tokens[:, -STEPS]).astype(jnp.float32)


ARMS = np.array([0.4, 0.3, 0.2, 0.1])  # π_ref of the bandit


@dataclass(frozen=True)
class Arms(WithEnd):
    """One row of scores: responses of one token out of four."""

    vocab_size: int = len(ARMS) + 1
    width: int = 1
    max_length: int | None = 2

    def init(self, key):
        """The row of π_ref."""
        return {"table": jnp.asarray(np.log(ARMS)[None], jnp.float32)}

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None):
        """The one state."""
        return jnp.ones((*tokens.shape, 1))

    def init_cache(self, batch, length):
        """The cache of rows in the one state."""
        return RowCache(jnp.zeros(batch, int))

    def _append(self, prefix, token):
        return jnp.zeros_like(prefix)


@settings
class Bandit:
    """Four arms, one of which is drawn."""

    def build(self, vocab_size: int | None = None) -> PrefixTable:
        """The row of π_ref."""
        return Arms()


@settings
class Digits:
    """The first digits, and an end token."""

    count: int = 3

    def build(self, texts: Iterable[str] = ()) -> FastTokenizer:
        """A tokenizer of one token a letter; it reads no texts."""
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

        backend = Tokenizer(models.WordLevel({str(i): i for i in range(self.count)}, unk_token="0"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")  # type: ignore
        backend.add_special_tokens([AddedToken(EOS_TOKEN, special=True)])
        return FastTokenizer(backend, "digits")


@settings
class Judge:
    """The value of each answer as somebody sees it who is not sure: Gumbel noise is added to it.

    Of two answers the higher one is then that which a vote by Bradley and Terry takes. An answer has the sum of
    its tokens' values, less ½ if it is one of several that starts with 1: `hybrid_jax.testing.true_reward`.
    """

    values: tuple[float, ...]

    def score_tokens(self, tokens, attention_mask, response_mask):
        """`DeviceReward.score_tokens`; the noise is fresh for each batch, and the same in each run."""
        length = response_mask.shape[1]
        chosen = tokens[:, -length:]
        value = jnp.asarray((*self.values, 0.0))[chosen].sum(axis=1)
        value -= 0.5 * ((chosen[:, 0] == 1) & (length > 1))
        weights = jax.random.bits(jax.random.key(1), chosen.shape).astype(jnp.uint32)
        key = jax.random.fold_in(jax.random.key(0), jnp.sum(weights * chosen.astype(jnp.uint32)))
        return value + jax.random.gumbel(key, value.shape)
