"""Ancestral sampling: read the prompts once, then one token a row at a time from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.registry import Registry, UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.parallel.rules import shard
from hybrid_jax.sampling.logits import sample_token

SAMPLERS: Registry = Registry("sampler")


@SAMPLERS.register("ancestral")
@dataclass(frozen=True)
class Sampler:
    """Settings of `generate`: ``temperature`` 0 is greedy, ``None`` cuts nothing off."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

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
        return _generate(model, self, tuple(eos_ids), params, prompt_tokens, prompt_mask, key)


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


@partial(jax.jit, static_argnames=("model", "sampler", "eos_ids"))
def _generate(
    model, sampler: Sampler, eos_ids: tuple[int, ...], params, prompt_tokens, prompt_mask, key
) -> Samples:
    batch, prompt_length = prompt_tokens.shape
    num_tokens = sampler.max_new_tokens
    noise = response_noise(key, batch, num_tokens)

    def record(samples: Samples, t, logits, ended):
        """Draws response token t and writes it down where the row has not ended."""
        drawn = lax.dynamic_index_in_dim(noise, t, axis=1, keepdims=False)
        token, log_prob = sample_token(logits, drawn, sampler.temperature, sampler.top_k, sampler.top_p)
        token, log_prob = jnp.where(ended, 0, token), jnp.where(ended, 0.0, log_prob)
        samples = Samples(
            tokens=lax.dynamic_update_slice(samples.tokens, token[:, None], (0, t)),
            log_probs=lax.dynamic_update_slice(samples.log_probs, log_prob[:, None], (0, t)),
            response_mask=lax.dynamic_update_slice(samples.response_mask, ~ended[:, None], (0, t)),
        )
        return samples, token, ended | jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else ended

    def unfinished(state):
        t, _, _, _, ended = state
        return (t < num_tokens) & ~jnp.all(ended) if eos_ids else t < num_tokens

    def next_token(state):
        t, samples, cache, token, ended = state
        logits, cache = model.step(params, token, cache)
        samples, token, ended = record(samples, t, logits, ended)
        return t + 1, samples, cache, token, ended

    samples = Samples(
        tokens=jnp.zeros((batch, num_tokens), jnp.int32),
        log_probs=jnp.zeros((batch, num_tokens)),
        response_mask=jnp.zeros((batch, num_tokens), bool),
    )
    # The last token is written down and never read, so the cache needs no slot for it.
    cache = model.init_cache(batch, prompt_length + num_tokens - 1)
    logits, cache = model.prefill(params, prompt_tokens, prompt_mask, cache)
    samples, token, ended = record(samples, 0, logits, jnp.zeros(batch, bool))
    state = lax.while_loop(unfinished, next_token, (jnp.int32(1), samples, cache, token, ended))
    return state[1]


def response_noise(key: Array, rows: int, num_tokens: int) -> Float[Array, "B R 2"]:
    """The uniform numbers of every response token: a function of the key, the row and the position alone."""
    of_row = lambda row: jax.random.uniform(jax.random.fold_in(key, row), (num_tokens, 2))  # noqa: E731
    return shard(jax.vmap(of_row)(jnp.arange(rows)), "batch", None, None)
