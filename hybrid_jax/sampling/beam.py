"""Beam search: the beginnings that are likeliest so far, each with its likeliest tokens (Lowerre 1976)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, settings
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.sampling.base import SAMPLERS, check_fits
from hybrid_jax.sampling.continuing import read_prompts
from hybrid_jax.sampling.logits import is_end


@SAMPLERS.register("beam")
@settings
class Beam:
    """The likeliest response that a beam finds, by ``log p(y) / |y|^length_power``.

    A beam as wide as there are beginnings finds the likeliest of all; one of width 1 is greedy.
    """

    max_new_tokens: Count = 64  # longest response
    width: BatchSize = 4  # beginnings that are kept
    length_power: NonNegative = 0.0  # 0 compares whole log-probabilities, 1 their means

    def __call__(
        self,
        model: LanguageModel,
        params: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        *,
        eos_ids: Sequence[int] = (),
    ) -> Samples:
        check_fits(model, prompt_tokens.shape[1], self.max_new_tokens, eos_ids)
        return _searched(self, model, params, prompt_tokens, prompt_mask, tuple(eos_ids))


@partial(jax.jit, static_argnames=("beam", "model", "eos_ids"))
def _searched(beam: Beam, model: LanguageModel, params, prompts, mask, eos_ids) -> Samples:
    params, width, length = model.cast(params), beam.width, beam.max_new_tokens
    read = read_prompts(model, params, prompts, mask, length)
    batch, vocab = read.logits.shape
    first = jnp.repeat(jnp.arange(batch), width)
    # All rows of a prompt begin alike, so only one of them counts at the first token.
    scores = jnp.where(jnp.arange(width) == 0, 0.0, -jnp.inf)[None].repeat(batch, axis=0)
    empty = jnp.zeros((batch * width, length), jnp.int32)

    def chosen(t, logits, cache, busy, scores, tokens, kept):
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, width, vocab)
        # A response that has ended goes on in one way, which costs nothing.
        still = jnp.where(jnp.arange(vocab) == 0, 0.0, -jnp.inf)
        alive = busy.reshape(batch, width, 1)
        totals = scores[..., None] + jnp.where(alive, log_probs, still)
        lengths = jnp.sum(kept, axis=1).reshape(batch, width, 1) + alive
        ranked = _ranked(totals, lengths, beam.length_power).reshape(batch, width * vocab)
        _, best = lax.top_k(ranked, width)
        scores = jnp.take_along_axis(totals.reshape(batch, width * vocab), best, 1)
        parents = (jnp.arange(batch)[:, None] * width + best // vocab).reshape(-1)
        token = (best % vocab).reshape(-1).astype(jnp.int32)
        busy, tokens, kept = busy[parents], tokens[parents], kept[parents]
        tokens = tokens.at[:, t].set(jnp.where(busy, token, 0))
        kept = kept.at[:, t].set(busy)
        return t + 1, token, cache.take(parents), busy & ~is_end(token, eos_ids), scores, tokens, kept

    def unfinished(carry):
        t, _, _, busy, *_ = carry
        return (t < length) & jnp.any(busy)

    def step(carry):
        t, token, cache, *beams = carry
        logits, cache = model.step(params, token, cache)
        return chosen(t, logits, cache, *beams)

    busy, cache = jnp.ones(batch * width, bool), read.cache.take(first)
    start = chosen(jnp.int32(0), read.logits[first], cache, busy, scores, empty, empty > 0)
    *_, scores, tokens, kept = lax.while_loop(unfinished, step, start)
    lengths = jnp.sum(kept, axis=1).reshape(batch, width)
    best = jnp.argmax(_ranked(scores, lengths, beam.length_power), axis=1)
    rows = jnp.arange(batch) * width + best
    return Samples(tokens[rows], None, kept[rows], kept[rows])


def _ranked(scores: Float[Array, "..."], lengths: Int[Array, "..."], power: float) -> Float[Array, "..."]:
    return scores / jnp.maximum(lengths, 1).astype(jnp.float32) ** power
