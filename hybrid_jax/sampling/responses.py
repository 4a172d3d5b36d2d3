"""Reading sampled responses: rows with their prompts, whether they ended, their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.data.continuations import decode_behind
from hybrid_jax.data.tokenizer import Tokenizer


def join(
    prompt_tokens: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], samples: Samples
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Prompts and responses as one row each: tokens and attention mask."""
    tokens = jnp.concatenate([prompt_tokens, samples.tokens], axis=1)
    return tokens, jnp.concatenate([prompt_mask, samples.attention_mask], axis=1)


def ended(tokens: Any, action_mask: Any, eos_ids: Sequence[int]) -> Any:
    """Tells whether each response ended by itself, with an end as its last chosen token, and not by length.

    Arrays may be on the host or on the device; the result, bool [B], is where they are.
    """
    xp = np if isinstance(tokens, np.ndarray) else jnp
    chosen_from_here = xp.cumsum(action_mask[:, ::-1], axis=1)[:, ::-1]
    is_last = action_mask & (chosen_from_here == 1)
    return xp.any(is_last & xp.isin(tokens, xp.asarray(eos_ids, tokens.dtype)), axis=1)


def decode_responses(
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: np.ndarray,
    action_mask: np.ndarray,
    eos_ids: Sequence[int],
) -> list[str]:
    """Texts of the responses, as they read behind their prompts, without their end-of-sequence tokens.

    Args:
        tokenizer: of the model.
        prompts: the tokens of each prompt, without padding.
        tokens: of the responses, int [B R].
        action_mask: which of them were chosen, bool [B R].
        eos_ids: what ends a response.
    """
    return [
        decode_behind(tokenizer, prompt, [token for token in row[mask].tolist() if token not in eos_ids])
        for prompt, row, mask in zip(prompts, tokens, action_mask, strict=True)
    ]
