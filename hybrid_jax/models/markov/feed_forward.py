"""The neural model of order k (Bengio et al. 2003, A neural probabilistic language model, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.ranges import Count, Rate, Vocabulary, Width, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import linear, placed_logits
from hybrid_jax.models.markov.windows import OrderK
from hybrid_jax.models.vocabulary import embedding_rows


@BACKBONES.register("feed_forward")
@settings
class FeedForwardSettings:
    """Settings of a feed-forward model of the last k tokens; see `FeedForward`."""

    order: Count = 8  # k, the tokens that the next one depends on
    embedding_width: Width = 64  # of each of them
    width: Width = 256  # of the hidden layer
    direct: bool = True  # the embeddings reach the scores past the hidden layer, too
    dropout: Rate = 0.0  # of the hidden layer
    vocab_size: Vocabulary | None = None  # rows of the embedding; null: the tokenizer's

    def build(self, vocab_size: int | None = None) -> FeedForward:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return FeedForward(replace(self, vocab_size=embedding_rows(self.vocab_size, vocab_size)))


@dataclass(frozen=True)
class FeedForward(OrderK):
    """The model

    x = [C(x_{t−k+1}) … C(x_t)]        a learned vector stands before the beginning of a sequence
    y = b + W x + U tanh(d + H x)      no W x where ``direct`` is false
    """

    settings: FeedForwardSettings

    @property
    def width(self) -> int:
        """Channels of a hidden state: those of the hidden layer, and of x."""
        return self.settings.width + self.settings.direct * self._inputs

    @property
    def _inputs(self) -> int:
        return self.order * self.settings.embedding_width

    def init(self, key: Array) -> Params:
        """Random parameters; W x begins at 0."""
        c, keys = self.settings, jax.random.split(key, 4)
        normal = jax.nn.initializers.lecun_normal()
        head = normal(keys[3], (c.width, self.vocab_size))
        if c.direct:
            head = jnp.concatenate([head, jnp.zeros((self._inputs, self.vocab_size))])
        return {
            "token_embedding": {"embedding": jax.random.normal(keys[0], (self.vocab_size, c.embedding_width))},
            "start": {"bias": jax.random.normal(keys[1], (c.embedding_width,))},
            "up": {"kernel": normal(keys[2], (self._inputs, c.width)), "bias": jnp.zeros(c.width)},
            "lm_head": {"kernel": head, "bias": jnp.zeros(self.vocab_size)},
        }

    def of_windows(
        self, params: Params, windows: Int[Array, "N K"], mask: Bool[Array, "N K"], key: Array | None = None
    ) -> tuple[Float[Array, "N D"], dict[str, Sum]]:
        """`OrderK.of_windows`: tanh(d + H x), and x."""
        embedded = jnp.take(params["token_embedding"]["embedding"], windows, axis=0)
        embedded = jnp.where(mask[..., None], embedded, params["start"]["bias"])
        x = embedded.reshape(len(windows), -1)
        hidden = jnp.tanh(linear(x, params["up"]["kernel"], params["up"]["bias"]))
        if key is not None and self.settings.dropout:
            kept = jax.random.bernoulli(key, 1.0 - self.settings.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1.0 - self.settings.dropout), 0.0)
        return jnp.concatenate([hidden, x], axis=-1) if self.settings.direct else hidden, {}

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""
        return placed_logits(linear(hidden, params["lm_head"]["kernel"], params["lm_head"]["bias"]))
