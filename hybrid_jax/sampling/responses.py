"""What is read of sampled responses: rows with their prompts, whether they ended, their texts."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.data.tokenizer import Tokenizer


def join(
    prompt_tokens: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], samples: Samples
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompts and responses as one row each: tokens and attention mask."""
    tokens = jnp.concatenate([prompt_tokens, samples.tokens], axis=1)
    return tokens, jnp.concatenate([prompt_mask, samples.attention_mask], axis=1)


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
