"""Models that see the last k tokens and nothing else: Markov chains of order k.

    p(x_{t+1} | x_1 … x_t) = p(x_{t+1} | x_{t−k+1} … x_t)

Each next token is a function of one window of k tokens; a sequence that has fewer so far has a shorter window.
Attention over a window of k in several layers is no such model: with L layers it sees L (k − 1) + 1 tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.models.base import ModelOutput, Params, RowCache

_AT_ONCE = 2**15  # tokens of windows that are read together, in training and of prompts


class OrderK(ABC):
    """A `LanguageModel` of windows: a subclass says what follows one. Make it a frozen dataclass.

    Its cache is the last k tokens, so a token costs as much behind a long text as behind a short one. It reads
    rows of any length.
    """

    max_length = None
    settings: Any  # with ``order``, and ``vocab_size`` unless the model has one of its own

    @property
    def order(self) -> int:
        """k, the number of tokens that the next one depends on."""
        return self.settings.order

    @property
    def vocab_size(self) -> int:
        """Number of tokens, V."""
        return self.settings.vocab_size

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a hidden state, D."""

    @abstractmethod
    def of_windows(
        self, params: Params, windows: Int[Array, "N K"], mask: Bool[Array, "N K"], key: Array | None = None
    ) -> tuple[Float[Array, "N D"], dict[str, Sum]]:
        """The hidden state behind each window, and the losses that `loss_coefs` names.

        Args:
            params: of the model.
            windows: tokens, the last one at the right.
            mask: False before the beginning of a sequence, at the left, and all over where there is no token.
            key: of dropout; None drops nothing.
        """

    @abstractmethod
    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`LanguageModel.logits`."""

    @property
    def loss_coefs(self) -> dict[str, float]:
        """Empty, unless a model has losses of its own."""
        return {}

    def cast(self, params: Params) -> Params:
        """The same: it computes in float32."""
        return params

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None) -> Float[Array, "B T D"]:
        """`LanguageModel.hidden`."""
        return self.hidden_and_losses(params, tokens, attention_mask, dropout_key=dropout_key)[0]

    def hidden_and_losses(
        self, params, tokens, attention_mask=None, *, dropout_key=None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """`LanguageModel.hidden_and_losses`: one window for each token."""
        segments = jnp.ones_like(tokens) if attention_mask is None else attention_mask.astype(jnp.int32)
        windows, mask = windows_of(tokens, segments, self.order)
        return self._in_pieces(params, windows, mask, dropout_key)

    def apply(self, params, tokens, attention_mask=None, *, dropout_key=None) -> ModelOutput:
        """`LanguageModel.apply`."""
        hidden = self.hidden(params, tokens, attention_mask, dropout_key=dropout_key)
        return ModelOutput(logits=self.logits(params, hidden), hidden=hidden)

    def init_cache(self, batch: int, length: int) -> RowCache:
        """`LanguageModel.init_cache`: the last k tokens, none yet; as large for any length."""
        return RowCache((jnp.zeros((batch, self.order), jnp.int32), jnp.zeros((batch, self.order), bool)))

    def extend(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: RowCache
    ) -> tuple[Float[Array, "B V"], RowCache]:
        """`LanguageModel.extend`."""
        window, mask = _last(*_behind(cache, tokens, attention_mask), self.order)
        hidden, _ = self.of_windows(params, window, mask)
        return self.logits(params, hidden), RowCache((window, mask))

    prefill = extend

    def read_on(
        self, params, tokens: Int[Array, "B X"], attention_mask: Bool[Array, "B X"], cache: RowCache
    ) -> tuple[Float[Array, "B X D"], RowCache]:
        """`StateReader.read_on`."""
        joined, real = _behind(cache, tokens, attention_mask)
        windows, mask = windows_of(joined, real.astype(jnp.int32), self.order)
        hidden, _ = self._in_pieces(params, windows[:, self.order :], mask[:, self.order :], None)
        return hidden, RowCache(_last(joined, real, self.order))

    def step(self, params, token: Int[Array, "B"], cache: RowCache) -> tuple[Float[Array, "B V"], RowCache]:
        """`LanguageModel.step`."""
        window, mask = cache.state
        window = jnp.concatenate([window[:, 1:], token[:, None].astype(window.dtype)], axis=1)
        mask = jnp.concatenate([mask[:, 1:], jnp.ones_like(mask[:, :1])], axis=1)
        return self.logits(params, self.of_windows(params, window, mask)[0]), RowCache((window, mask))

    def _in_pieces(
        self, params: Params, windows: Int[Array, "B T K"], mask: Bool[Array, "B T K"], key: Array | None
    ) -> tuple[Float[Array, "B T D"], dict[str, Sum]]:
        """All windows, some at a time: what is computed for one piece is computed again for its gradient."""
        rows, length, order = windows.shape
        flat = (windows.reshape(-1, order), mask.reshape(-1, order))
        size = max(1, _AT_ONCE // order)
        if rows * length <= size:
            hidden, losses = self.of_windows(params, *flat, key)
            return hidden.reshape(rows, length, -1), losses
        pieces = -(-rows * length // size)
        windows, mask = (
            jnp.pad(x, ((0, pieces * size - rows * length), (0, 0))).reshape(pieces, size, order) for x in flat
        )

        @jax.checkpoint
        def one(piece: tuple[Array, Array, Array]):
            tokens, real, number = piece
            own = None if key is None else jax.random.fold_in(key, number)
            return self.of_windows(params, tokens, real, own)

        hidden, losses = lax.map(one, (windows, mask, jnp.arange(pieces)))
        hidden = hidden.reshape(pieces * size, -1)[: rows * length].reshape(rows, length, -1)
        return hidden, jax.tree.map(lambda x: x.sum(axis=0), losses)


def windows_of(
    tokens: Int[Array, "B T"], segments: Int[Array, "B T"], order: int
) -> tuple[Int[Array, "B T K"], Bool[Array, "B T K"]]:
    """The last ``order`` tokens up to each one, within its segment; padding is passed over wherever it is.

    The mask is False before the beginning of a segment, and in all of the window of what is padding.
    """
    real = segments > 0
    places = jnp.argsort(~real, axis=1, stable=True)  # the real tokens, one after the other
    rank = jnp.cumsum(real, axis=1) - 1
    wanted = rank[..., None] - jnp.arange(order)[::-1]
    rows = jnp.arange(len(tokens))[:, None, None]
    index = places[rows, jnp.maximum(wanted, 0)]
    mask = (wanted >= 0) & (segments[rows, index] == segments[..., None]) & real[..., None]
    return tokens[rows, index], mask


def _behind(cache: RowCache, tokens: Int[Array, "B X"], attention_mask: Array) -> tuple[Array, Array]:
    """The tokens of a cache and those that are read behind them, and which are real."""
    before, mask = cache.state
    return (
        jnp.concatenate([before, tokens.astype(before.dtype)], axis=1),
        jnp.concatenate([mask, attention_mask > 0], axis=1),
    )


def _last(
    tokens: Int[Array, "B T"], real: Bool[Array, "B T"], order: int
) -> tuple[Int[Array, "B K"], Bool[Array, "B K"]]:
    """The last ``order`` real tokens of each row, at the right."""
    places = jnp.argsort(real, axis=1, stable=True)[:, -order:]  # real ones last, in their order
    return jnp.take_along_axis(tokens, places, axis=1), jnp.take_along_axis(real, places, axis=1)
