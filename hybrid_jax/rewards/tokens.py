"""Rewards on tokens, computed on the device: with them a whole PPO iteration is one pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Finite, Natural, Positive, settings
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("token_count")
@settings
class TokenCount:
    """Weighted counts: ``sum over t of weights[y_t]``, plus ``first_token_weights[y_0]``; others weigh 0.

    Attributes:
        weights: Token id -> what each occurrence in the response is worth.
        first_token_weights: Token id -> what it is worth in addition as the first token of the response.
    """

    weights: Mapping[Natural, Finite]
    first_token_weights: Mapping[Natural, Finite] = field(default_factory=dict)

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        """Sums what the tokens of each response are worth, float32 [B]."""
        response = tokens[:, -response_mask.shape[1] :]
        worth = _worth(response, self.weights).at[:, 0].add(_worth(response[:, 0], self.first_token_weights))
        return jnp.sum(jnp.where(response_mask, worth, 0.0), axis=1)


@REWARDS.register("token_length")
@settings
class TokenLength:
    """``-|n - target| / scale`` for a response of n tokens, the end-of-sequence token included."""

    target: Natural  # wanted number of tokens
    scale: Positive = 1.0  # tokens off that cost 1

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        """Scores by the number of tokens, float32 [B]."""
        length = jnp.sum(response_mask, axis=1, dtype=jnp.float32)
        return -jnp.abs(length - self.target) / self.scale


def _worth(tokens: Int[Array, "..."], weights: Mapping) -> Float[Array, "..."]:
    worth = jnp.zeros(tokens.shape, jnp.float32)
    for token_id, weight in weights.items():
        worth = jnp.where(tokens == token_id, weight, worth)
    return worth
