"""Rewards on tokens that never leave the device: with them a whole PPO iteration is one pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("token_count")
@dataclass(frozen=True)
class TokenCount:
    """Weighted counts: ``sum over t of weights[y_t]``, plus ``first_token_weights[y_0]``; others weigh 0.

    Attributes:
        weights: Token id -> what each occurrence in the response is worth.
        first_token_weights: Token id -> what it is worth in addition as the first token of the response.
    """

    weights: Mapping[int, float]
    first_token_weights: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:  # a config's keys arrive as texts
        for name in ("weights", "first_token_weights"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        response = tokens[:, -response_mask.shape[1] :]
        worth = _worth(response, self.weights).at[:, 0].add(_worth(response[:, 0], self.first_token_weights))
        return jnp.sum(jnp.where(response_mask, worth, 0.0), axis=1)


@REWARDS.register("token_length")
@dataclass(frozen=True)
class TokenLength:
    """``-|n - target| / scale`` for a response of n tokens, the end-of-sequence token included."""

    target: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"target must be at least 0 tokens, got {self.target}")
        if self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        length = jnp.sum(response_mask, axis=1, dtype=jnp.float32)
        return -jnp.abs(length - self.target) / self.scale


def _token_ids(name: str, weights: Mapping) -> dict[int, float]:
    try:
        ids = {int(key): float(weight) for key, weight in weights.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{name} must map token ids to numbers, got {dict(weights)}") from None
    if any(key < 0 for key in ids):
        raise ValueError(f"{name} must map token ids of at least 0, got {min(ids)}")
    return ids


def _worth(tokens: Int[Array, "..."], weights: Mapping) -> Float[Array, "..."]:
    worth = jnp.zeros(tokens.shape, jnp.float32)
    for token_id, weight in weights.items():
        worth = jnp.where(tokens == token_id, weight, worth)
    return worth
