"""Best of n: several answers to each prompt, of which the one with the highest score is kept (Stiennon 2020).

Without ties an answer y is kept with the probability F(y)^n − F⁻(y)^n, where F(y) is that of a score of at
most its own and F⁻(y) that of a lower one. Its KL from the policy is at most log n − (n − 1)/n (Beirami et al.
2024): a bound, and no equality where answers are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import BatchSize, Count, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.continuing import Prompted, Responses, continue_from, read_prompts
from hybrid_jax.sampling.logits import response_keys, response_noise
from hybrid_jax.sampling.scoring import ChoosesByReward, check_scores, score_of


@SAMPLERS.register("best_of_n")
@settings
class BestOfN(ChoosesByReward):
    """The best of ``n`` answers to each prompt, by a reward or by the mean log-probability of a token."""

    max_new_tokens: Count = 64  # longest response
    n: BatchSize = 8  # answers to choose from
    temperature: Positive = 1.0  # of the draws
    reward: Annotated[Any, REWARDS] | None = None  # of an answer; null: its mean log-probability
    softness: Positive | None = None  # chooses with probabilities softmax(scores / softness); null: the best

    def __call__(
        self,
        model: LanguageModel,
        params: Params,
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        *,
        eos_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
    ) -> Samples:
        check_fits(model, prompt_tokens.shape[1], self.max_new_tokens, eos_ids)
        rows = jnp.repeat(jnp.arange(len(prompt_tokens)), self.n)
        key, last = jax.random.split(key)
        said = _drawn(Static(self), model, params, prompt_tokens, prompt_mask, key, tuple(eos_ids))
        if self.reward is None:
            scores = jnp.sum(said.log_probs, axis=1) / said.lengths
        else:
            repeated = prompt_tokens[rows], prompt_mask[rows]
            scores = score_of(self.reward, *repeated, eos_ids, tokenizer)(said.samples)
        scores = scores.reshape(-1, self.n)
        check_scores(scores, jnp.max(scores, axis=1))
        if self.softness is not None:
            # The largest of scores with Gumbel noise is a draw from their softmax.
            scores = scores / self.softness + jax.random.gumbel(last, scores.shape)
        best = jnp.arange(len(scores)) * self.n + jnp.argmax(scores, axis=1)
        return jax.tree.map(lambda x: x[best], said.samples)


@partial(jax.jit, static_argnames=("settings", "model", "eos_ids"))
def _drawn(settings: Static[BestOfN], model, params, prompts, mask, key, eos_ids) -> Responses:
    """Answers to every prompt, those to one prompt one after the other; prompts are read once."""
    sampler = settings.value
    params, count = model.cast(params), len(prompts) * sampler.n
    read = read_prompts(model, params, prompts, mask, sampler.max_new_tokens)
    rows = jnp.repeat(jnp.arange(len(prompts)), sampler.n)
    prompted = Prompted(read.cache.take(rows), read.logits[rows])
    noise = response_noise(response_keys(key, jnp.arange(count)), sampler.max_new_tokens)
    given = jnp.zeros((count, sampler.max_new_tokens), jnp.int32)
    none = jnp.zeros(count, jnp.int32)
    return continue_from(model, params, prompted, given, none, noise, sampler.temperature, eos_ids)
