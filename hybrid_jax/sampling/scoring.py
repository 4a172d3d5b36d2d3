"""Rewards as samplers read them: of responses while they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.rewards.base import DeviceReward, evaluate_reward
from hybrid_jax.sampling.responses import decode_responses, join

Score = Callable[[Samples], Float[Array, "B"]]


def reads_texts(reward: Any) -> bool:
    """Tells whether a reward needs texts, and so the host."""
    return reward is not None and not isinstance(reward, DeviceReward)


def check_scores(scores: Float[Array, "B ..."], best: Float[Array, "B"]) -> None:
    """Refuses rewards that are no number, and prompts that no answer may be given to; not while it is traced.

    Args:
        scores: of all answers that were tried.
        best: of those to one prompt.

    Raises:
        UserError: a score is NaN, or that of every answer to a prompt is -inf.
    """
    if isinstance(best, Tracer):
        return
    if np.isnan(scores).any():
        raise UserError("sampler.reward must give numbers, got nan for an answer")
    if np.isneginf(best).any():
        raise UserError(
            "sampler.reward is -inf for every answer that was tried to a prompt; try more of them, or take a "
            "finite penalty"
        )


class ChoosesByReward:
    """A sampler with a setting ``reward``."""

    reward: Any

    @property
    def reads_texts(self) -> bool:
        """Tells whether it needs a tokenizer (`sampling.base.sample`)."""
        return reads_texts(self.reward)


def score_of(
    reward: Any,
    prompt_tokens: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    eos_ids: Sequence[int],
    tokenizer: Tokenizer | None,
) -> Score:
    """The scores of responses to some prompts, float32 [B]; 0 without a reward.

    Raises:
        UserError: the reward reads texts, and there is no tokenizer: its caller runs on the device alone.
    """
    if reward is None:
        return lambda samples: jnp.zeros(len(samples.tokens))
    if not reads_texts(reward):
        return lambda samples: reward.score_tokens(
            *join(prompt_tokens, prompt_mask, samples), samples.action_mask
        )
    if tokenizer is None:
        raise UserError("sampler.reward must be one on tokens here, such as token_count: texts need the host")
    prompts = [
        row[mask].tolist() for row, mask in zip(np.asarray(prompt_tokens), np.asarray(prompt_mask), strict=True)
    ]
    asked = [tokenizer.decode(prompt) for prompt in prompts]

    def score(samples: Samples) -> Array:
        arrays = np.asarray(samples.tokens), np.asarray(samples.action_mask)
        texts = decode_responses(tokenizer, prompts, *arrays, eos_ids)
        return jnp.asarray(evaluate_reward("sampler.reward", reward, asked, texts))

    return score
