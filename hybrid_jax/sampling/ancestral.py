"""Ancestral sampling: read the prompts once, then one token a row at a time from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Interval
from jax import lax
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, Positive, settings
from hybrid_jax.models.base import LanguageModel, Params, SlotCache
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import as_in_training, shard_params, target_platform
from hybrid_jax.sampling.base import SAMPLERS, check_fits
from hybrid_jax.sampling.engine import Engine
from hybrid_jax.sampling.logits import response_keys
from hybrid_jax.sampling.queue import answer_in_turn
from hybrid_jax.sampling.rules import TokenRules

Penalty = Annotated[float, Interval(ge=-2, le=2)]  # OpenAI's range

_MOST_CHUNKS = 4  # each costs a compiled loop, and a copy of the cache between two of them
_SMALLEST_CHUNK = 64  # tokens


@SAMPLERS.register("ancestral")
@settings
class Ancestral:
    """Settings of `generate`: ``temperature`` 0 is greedy, ``None`` cuts nothing off."""

    max_new_tokens: Count = 64  # longest response
    temperature: NonNegative = 1.0  # divisor of the logits; 0 is greedy
    top_k: Count | None = None  # likeliest tokens that may be chosen; null: all
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None  # mass of the likeliest that may be; null: 1
    slots: BatchSize | None = None  # rows decoded at once; one that has ended takes the next prompt; null: all
    min_p: Annotated[float, Interval(gt=0, le=1)] | None = None  # least probability, over the likeliest token's
    typical_p: Annotated[float, Interval(gt=0, le=1)] | None = None  # mass of those about as likely as expected
    repetition_penalty: Positive | None = (
        None  # divides logits above 0 of tokens read or said, multiplies others
    )
    frequency_penalty: Penalty | None = None  # taken from a logit for each time that the response has the token
    presence_penalty: Penalty | None = None  # taken from a logit once the response has the token

    @property
    def rules(self) -> TokenRules:
        """The rules by which a token is drawn."""
        names = (field.name for field in fields(TokenRules))
        return TokenRules(**{name: getattr(self, name) for name in names})

    @property
    def policy_temperature(self) -> float | None:
        """``temperature`` where nothing is cut off or penalised and it is not greedy, else None (`Sampler`)."""
        return self.temperature if self.rules.keeps_all and self.temperature > 0 else None

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
        engine = Engine(model, tuple(eos_ids), self.max_new_tokens, self.rules)
        inputs = (params, prompt_tokens, prompt_mask, key)
        if self.slots is not None and self.slots < len(prompt_tokens):
            return answer_in_turn(engine, self.slots, *inputs)
        lengths = cache_lengths(model, prompt_tokens.shape[1], self.max_new_tokens)
        return _answer_at_once(engine, lengths, *inputs)


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
    **rules: Any,
) -> Samples:
    """Samples a response to every left-padded prompt; compiled once for each model, settings and shape.

    The end-of-sequence token is sampled and belongs to the response; behind it tokens are 0, the mask is
    False. Decoding stops when every row has ended. The same key gives the same samples on any number of
    devices. ``rules`` are other settings of `Ancestral`, such as ``min_p``.

    Returns:
        `Samples` [B max_new_tokens]; ``log_probs`` are those of the distribution that sampled: temperature,
        penalties and what is cut off included, renormalised (0 behind the end).
    """
    try:
        sampler = Ancestral(max_new_tokens, temperature, top_k, top_p, **rules)
    except ValueError as error:
        raise UserError(str(error)) from error
    return sampler(model, params, prompt_tokens, prompt_mask, key, eos_ids=eos_ids)


@partial(jax.jit, static_argnames=("engine", "lengths"))
def _answer_at_once(
    engine: Engine, lengths: tuple[int, ...], params: Any, prompt_tokens, prompt_mask, key
) -> Samples:
    """The engine over one batch; the cache has one of ``lengths`` after the other."""
    batch, prompt_length = prompt_tokens.shape
    params = engine.model.cast(params)  # once, not at every token
    # Prompts are read like any batch, with weights gathered a layer at a time. One token is too little for
    # that, so the weights lie as the rollout's rules want them before the first is decoded.
    settled = shard_params(params, param_axes)
    keys, prefill = response_keys(key, jnp.arange(batch)), as_in_training(engine.model.prefill)
    state = engine.init(batch, lengths[0])
    state, _ = engine.start(params, state, prompt_tokens, prompt_mask, keys, prefill)
    t = jnp.int32(1)
    for length in lengths:
        stop = length - prompt_length + 1  # the last token is written down and never read: it needs no slot

        def unfinished(carry, stop=stop):
            t, state = carry
            return (t < stop) & jnp.any(state.rows.busy) if engine.eos_ids else t < stop

        if length > lengths[0]:
            state = state.grown(length)
        step = lambda carry: (carry[0] + 1, engine.step(settled, carry[1])[0])  # noqa: E731
        t, state = lax.while_loop(unfinished, step, (t, state))
    return engine.harvest(state)


def cache_lengths(model: LanguageModel, prompt_length: int, num_tokens: int) -> tuple[int, ...]:
    """How many slots the cache has, one after the other: a token reads all of them, in use or not.

    On an accelerator the cache grows up to three times, since a step takes as long as reading it does; on a
    CPU all slots from the start on measured faster.
    """
    chunks = 1
    if target_platform() != "cpu" and isinstance(jax.eval_shape(lambda: model.init_cache(1, 1)), SlotCache):
        chunks = min(_MOST_CHUNKS, max(1, num_tokens // _SMALLEST_CHUNK))
    return tuple(prompt_length + num_tokens * i // chunks - 1 for i in range(1, chunks + 1))
