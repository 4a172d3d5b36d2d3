"""Ancestral sampling: read the prompts once, then one token a row at a time from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Interval
from jax import lax
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.models.base import LanguageModel, Params, SlotCache
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import as_in_training, shard_params, target_platform
from hybrid_jax.sampling.logits import is_end, response_noise, sample_token
from hybrid_jax.sampling.refill import generate_in_slots

SAMPLERS: Registry = Registry("sampler")

_MOST_CHUNKS = 4  # each costs a compiled loop, and a copy of the cache between two of them
_SMALLEST_CHUNK = 64  # tokens


@SAMPLERS.register("ancestral")
@settings
class Sampler:
    """Settings of `generate`: ``temperature`` 0 is greedy, ``None`` cuts nothing off."""

    max_new_tokens: Count = 64
    temperature: NonNegative = 1.0
    top_k: Count | None = None
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    # rows decoded at once; one that has ended takes the next prompt (`refill`). All
    slots: BatchSize | None = None

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
        length = prompt_tokens.shape[1] + self.max_new_tokens
        if model.max_length is not None and length > model.max_length:
            raise UserError(
                f"max_new_tokens must be at most {model.max_length - prompt_tokens.shape[1]} (prompts of "
                f"{prompt_tokens.shape[1]} tokens, max_length {model.max_length}), got {self.max_new_tokens}"
            )
        if bad := [token for token in eos_ids if not 0 <= token < model.vocab_size]:
            raise UserError(f"eos_ids must be tokens below the vocabulary's {model.vocab_size}, got {bad[0]}")
        if self.slots is not None and self.slots < len(prompt_tokens):
            return generate_in_slots(
                model, self, tuple(eos_ids), self.slots, params, prompt_tokens, prompt_mask, key
            )
        lengths = cache_lengths(model, prompt_tokens.shape[1], self.max_new_tokens)
        return _generate(model, self, tuple(eos_ids), lengths, params, prompt_tokens, prompt_mask, key)


def generate(
    model: LanguageModel,
    params: Params,
    prompt_tokens: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: Sequence[int] = (),
) -> Samples:
    """Samples a response to every left-padded prompt; compiled once for each model, settings and shape.

    The end-of-sequence token is sampled and belongs to the response; behind it tokens are 0, the mask is
    False. Decoding stops when every row has ended. The same key gives the same samples on any number of
    devices.

    Returns:
        `Samples` [B max_new_tokens]; ``log_probs`` are those of the distribution that sampled: temperature,
        top-k and top-p included, renormalised (0 behind the end).
    """
    try:
        sampler = Sampler(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error
    return sampler(model, params, prompt_tokens, prompt_mask, key, eos_ids=eos_ids)


@partial(jax.jit, static_argnames=("model", "sampler", "eos_ids", "lengths"))
def _generate(
    model, sampler: Sampler, eos_ids: tuple[int, ...], lengths, params, prompt_tokens, prompt_mask, key
) -> Samples:
    batch, prompt_length = prompt_tokens.shape
    num_tokens = sampler.max_new_tokens
    noise = response_noise(key, batch, num_tokens)
    params = model.cast(params)  # once, not at every token
    # Prompts are read like any batch, with weights gathered a layer at a time. One token is too little for
    # that, so the weights lie as the rollout's rules want them before the first is decoded.
    settled = shard_params(params, param_axes)

    def record(samples: Samples, t, logits, ended):
        """Draws response token t and writes it down where the row has not ended."""
        drawn = lax.dynamic_index_in_dim(noise, t, axis=1, keepdims=False)
        token, log_prob = sample_token(logits, drawn, sampler.temperature, sampler.top_k, sampler.top_p)
        token, log_prob = jnp.where(ended, 0, token), jnp.where(ended, 0.0, log_prob)
        samples = replace(
            samples,
            tokens=lax.dynamic_update_slice(samples.tokens, token[:, None], (0, t)),
            log_probs=lax.dynamic_update_slice(samples.log_probs, log_prob[:, None], (0, t)),
            action_mask=lax.dynamic_update_slice(samples.action_mask, ~ended[:, None], (0, t)),
        )
        return samples, token, ended | is_end(token, eos_ids)

    def next_token(state):
        t, samples, cache, token, ended = state
        logits, cache = model.step(settled, token, cache)
        samples, token, ended = record(samples, t, logits, ended)
        return t + 1, samples, cache, token, ended

    samples = Samples.empty(batch, num_tokens)
    cache = model.init_cache(batch, lengths[0])
    logits, cache = as_in_training(model.prefill)(params, prompt_tokens, prompt_mask, cache)
    samples, token, ended = record(samples, 0, logits, jnp.zeros(batch, bool))
    t = jnp.int32(1)
    for length in lengths:
        stop = length - prompt_length + 1  # the last token is written down and never read: it needs no slot

        def unfinished(state, stop=stop):
            t, _, _, _, ended = state
            return (t < stop) & ~jnp.all(ended) if eos_ids else t < stop

        if length > lengths[0]:
            cache = cache.grown(length)
        state = (t, samples, cache, token, ended)
        t, samples, cache, token, ended = lax.while_loop(unfinished, next_token, state)
    return replace(samples, attention_mask=samples.action_mask)


def cache_lengths(model: LanguageModel, prompt_length: int, num_tokens: int) -> tuple[int, ...]:
    """How many slots the cache has, one after the other: a token reads all of them, in use or not.

    On an accelerator the cache grows up to three times, since a step takes as long as reading it does; on a
    CPU all slots from the start on measured faster.
    """
    chunks = 1
    if target_platform() != "cpu" and isinstance(jax.eval_shape(lambda: model.init_cache(1, 1)), SlotCache):
        chunks = min(_MOST_CHUNKS, max(1, num_tokens // _SMALLEST_CHUNK))
    return tuple(prompt_length + num_tokens * i // chunks - 1 for i in range(1, chunks + 1))
