"""Responses that keep a beginning and are drawn anew behind it, with their log-probs under two distributions.

What chains, particles and searches have in common: they read tokens that are given and draw the others, all
from one cache that holds the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.sampling.logits import draw, is_end, scale_by_temperature


@struct.dataclass
class Prompted:
    """A cache that has read the prompts, and the scores of the first token behind them."""

    cache: Any
    logits: Float[Array, "B V"]


@struct.dataclass
class Responses:
    """Responses and their log-probs; behind the end tokens and log-probs are 0."""

    tokens: Int[Array, "B R"]
    mask: Bool[Array, "B R"]  # up to and including the end token
    log_probs: Float[Array, "B R"]  # of the model
    drawn_log_probs: Float[Array, "B R"]  # of the distribution that draws: another temperature

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Tokens of each, its end included."""
        return jnp.sum(self.mask, axis=1)

    @property
    def samples(self) -> Samples:
        """The responses alone: as those of no known distribution."""
        return Samples(self.tokens, None, self.mask, self.mask)


def read_prompts(
    model: LanguageModel, params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"], new_tokens: int
) -> Prompted:
    """Reads left-padded prompts, with room for responses of ``new_tokens``, of which the last is never read."""
    cache = model.init_cache(len(tokens), tokens.shape[1] + new_tokens - 1)
    logits, cache = model.prefill(params, tokens, mask, cache)
    return Prompted(cache, logits)


def continue_from(
    model: LanguageModel,
    params: Params,
    prompted: Prompted,
    given: Int[Array, "B R"],
    num_given: Int[Array, "B"],
    noise: Float[Array, "B R 2"],
    temperature: float,
    eos_ids: Sequence[int],
) -> Responses:
    """Responses that begin with the first ``num_given`` tokens of ``given``; the others are drawn.

    Args:
        model: that answers.
        params: of the model.
        prompted: what has been read before.
        given: tokens; none of those that are kept ends a response, but the last.
        num_given: how many are kept; R or more scores a whole response.
        noise: uniform numbers that draw the others.
        temperature: of the distribution that they are drawn from.
        eos_ids: tokens that end a response.
    """
    rows, length = given.shape
    empty = Responses(
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length), bool),
        jnp.zeros((rows, length)),
        jnp.zeros((rows, length)),
    )

    def write(t, logits, busy, said):
        scaled = scale_by_temperature(logits, temperature)
        drawn, _ = draw(scaled, noise[:, t])
        token = jnp.where(t < num_given, given[:, t], drawn)
        values = (token, True, _log_prob(logits.astype(jnp.float32), token), _log_prob(scaled, token))
        put = lambda array, value: array.at[:, t].set(jnp.where(busy, value, 0).astype(array.dtype))  # noqa: E731
        said = Responses(*(put(array, value) for array, value in zip(_arrays(said), values, strict=True)))
        return token, busy & ~is_end(token, eos_ids), said

    def unfinished(carry):
        t, _, _, busy, _ = carry
        return (t < length) & jnp.any(busy)

    def step(carry):
        t, token, cache, busy, said = carry
        logits, cache = model.step(params, token, cache)
        token, busy, said = write(t, logits, busy, said)
        return t + 1, token, cache, busy, said

    # The last token is never read.
    token, busy, said = write(0, prompted.logits, jnp.ones(rows, bool), empty)
    return lax.while_loop(unfinished, step, (jnp.int32(1), token, prompted.cache, busy, said))[-1]


def _arrays(said: Responses) -> tuple[Array, ...]:
    return said.tokens, said.mask, said.log_probs, said.drawn_log_probs


def _log_prob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
