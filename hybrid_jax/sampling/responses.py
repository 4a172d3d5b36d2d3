"""The stages of a rollout: sample (device), score (device), reward (host, or device).

The log-probabilities that enter a loss are those of the distribution that sampled: logits over the
temperature, at the rollout, for the references and at the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.log_probs import LogitsOf, state_log_probs
from hybrid_jax.core.batches import Samples
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params


def join(
    prompt_tokens: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], samples: Samples
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompts and responses as one row each: tokens and attention mask."""
    tokens = jnp.concatenate([prompt_tokens, samples.tokens], axis=1)
    return tokens, jnp.concatenate([prompt_mask, samples.attention_mask], axis=1)


def states_before(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    response_length: int,
) -> Float[Array, "B R D"]:
    """The hidden state before each response token: what predicts it and what its value is read from."""
    return shift_states(model.hidden(params, tokens, attention_mask), response_length)


def shift_states(hidden: Float[Array, "B T D"], response_length: int) -> Float[Array, "B R D"]:
    """Of all hidden states, those before the response tokens."""
    return hidden[:, -response_length - 1 : -1]


def response_logits(model: LanguageModel, params: Params, temperature: float) -> LogitsOf:
    """The scores of response tokens under the distribution that samples them, from the states before them."""
    params = model.cast(params)
    return lambda states: model.logits(params, states) / temperature


def response_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    response_length: int,
    temperature: float,
) -> Float[Array, "B R"]:
    """log π(token | before) of every response token, read in one pass."""
    states = states_before(model, params, tokens, attention_mask, response_length)
    logits_of = response_logits(model, params, temperature)
    return state_log_probs(logits_of, states, tokens[:, -response_length:], model.vocab_size)[0]


def ended(
    tokens: Int[Array, "B R"], action_mask: Bool[Array, "B R"], eos_ids: Sequence[int]
) -> Bool[Array, "B"]:
    """Whether a response ended by itself, with an end-of-sequence token, rather than by its length."""
    is_end = jnp.isin(tokens, jnp.asarray(eos_ids, tokens.dtype))
    return jnp.any(is_end & action_mask, axis=1)


def decode_responses(
    tokenizer: Tokenizer, tokens: np.ndarray, action_mask: np.ndarray, eos_ids: Sequence[int]
) -> list[str]:
    """Texts of the responses, without their end-of-sequence tokens."""
    return [
        tokenizer.decode([int(token) for token in row[mask] if int(token) not in eos_ids])
        for row, mask in zip(tokens, action_mask, strict=True)
    ]
