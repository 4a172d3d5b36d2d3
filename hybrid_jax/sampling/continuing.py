"""Responses that keep a beginning and are drawn anew behind it, with their log-probs under two distributions.

What chains, particles and searches have in common: they read tokens that are given and draw the others, all
from one cache that holds the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.sampling.logits import draw, is_end, response_keys, response_noise, scale_by_temperature


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


@struct.dataclass
class Drawing:
    """Responses that are being drawn: what has been read, and the last token, which has not."""

    cache: Any
    token: Int[Array, "B"]
    busy: Bool[Array, "B"]  # whether the response goes on
    said: Responses

    @classmethod
    def begin(cls, cache: Any, rows: int, length: int) -> Drawing:
        """Responses of which nothing is drawn yet."""
        shape, none = (rows, length), jnp.zeros((rows, length))
        said = Responses(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), none, none)
        return cls(cache, jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), said)

    def take(self, rows: Int[Array, "N"]) -> Drawing:
        """The responses of ``rows``: some left out, some more than once."""
        others = jax.tree.map(lambda x: x[rows], (self.token, self.busy, self.said))
        return Drawing(self.cache.take(rows), *others)


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
    state, (_, length) = Drawing.begin(prompted.cache, *given.shape), given.shape
    logits, kept = prompted.logits, (given, num_given)
    return draw_until(length, model, params, state, logits, noise, 0, temperature, eos_ids, kept).said


def draw_until(
    end: int | Int[Array, ""],
    model: LanguageModel,
    params: Params,
    state: Drawing,
    logits: Float[Array, "B V"],
    noise: Float[Array, "B R 2"],
    begin: int | Int[Array, ""],
    temperature: float,
    eos_ids: Sequence[int],
    given: tuple[Int[Array, "B R"], Int[Array, "B"]] | None = None,
) -> Drawing:
    """Draws the tokens from ``begin`` to before ``end``; ``logits`` are those of the first of them.

    The others are as in `continue_from`.
    """

    def write(t, logits, state):
        scaled = scale_by_temperature(logits, temperature)
        token, _ = draw(scaled, noise[:, t])
        if given is not None:
            token = jnp.where(t < given[1], given[0][:, t], token)
        values = (token, True, _log_prob(logits.astype(jnp.float32), token), _log_prob(scaled, token))
        keep = lambda array, value: jnp.where(state.busy, value, 0).astype(array.dtype)  # noqa: E731
        put = lambda array, value: array.at[:, t].set(keep(array, value))  # noqa: E731
        said = Responses(*(put(array, value) for array, value in zip(_arrays(state.said), values, strict=True)))
        return replace(state, token=token, busy=state.busy & ~is_end(token, eos_ids), said=said)

    def unfinished(carry):
        t, state = carry
        return (t < end) & jnp.any(state.busy)

    def step(carry):
        t, state = carry
        logits, cache = model.step(params, state.token, state.cache)
        return t + 1, write(t, logits, replace(state, cache=cache))

    # The last token is never read.
    return lax.while_loop(unfinished, step, (jnp.int32(begin) + 1, write(begin, logits, state)))[1]


def draw_answers(
    model: LanguageModel,
    params: Params,
    prompts: Int[Array, "B P"],
    mask: Bool[Array, "B P"],
    key: Array,
    eos_ids: Sequence[int],
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    end: int | None = None,
) -> Drawing:
    """Draws ``n`` answers to every prompt, one after the other; prompts are read once.

    Args:
        model: that answers.
        params: of the model.
        prompts: left-padded.
        mask: True is a token.
        key: of the noise.
        eos_ids: tokens that end a response.
        n: answers to each prompt.
        max_new_tokens: longest response, R.
        temperature: of the draws.
        end: token before which they stop for now; None is R.
    """
    params, rows = model.cast(params), jnp.repeat(jnp.arange(len(prompts)), n)
    read = read_prompts(model, params, prompts, mask, max_new_tokens)
    noise = answer_noise(key, len(rows), max_new_tokens)
    start, end = Drawing.begin(read.cache.take(rows), len(rows), max_new_tokens), end or max_new_tokens
    return draw_until(end, model, params, start, read.logits[rows], noise, 0, temperature, eos_ids)


def answer_noise(key: Array, rows: int, max_new_tokens: int) -> Float[Array, "N R 2"]:
    """The uniform numbers that draw the answers of so many rows."""
    return response_noise(response_keys(key, jnp.arange(rows)), max_new_tokens)


def _arrays(said: Responses) -> tuple[Array, ...]:
    return said.tokens, said.mask, said.log_probs, said.drawn_log_probs


def _log_prob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
