"""Rewards that tell the answers to odd numbers apart, and no others."""

import jax.numpy as jnp

from hybrid_jax import settings


@settings
class OnTexts:
    """The place of the row for a prompt that is odd, 1 for all others."""

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Scores without reading the responses."""
        return [float(row) if int(prompt) % 2 else 1.0 for row, prompt in enumerate(prompts)]


@settings
class OnTokens:
    """The same, on the device: the last byte of a number is as odd as the number."""

    def score_tokens(self, tokens, attention_mask, response_mask):
        """Scores without reading the responses."""
        asked = tokens[:, -response_mask.shape[1] - 1]
        return jnp.where(asked % 2 == 1, jnp.arange(len(tokens)), 1.0).astype(jnp.float32)


@settings
class Alike:
    """The same for every answer."""

    def __call__(self, responses: list[str]) -> list[float]:
        """Scores nothing."""
        return [0.7] * len(responses)
