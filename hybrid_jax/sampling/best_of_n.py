"""Best of n: several answers to each prompt, of which the one with the highest score is kept (Stiennon 2020).

Without ties an answer y is kept with the probability F(y)^n − F⁻(y)^n, where F(y) is that of a score of at
most its own and F⁻(y) that of a lower one. Its KL from the policy is at most log n − (n − 1)/n (Beirami et al.
2024): a bound, and no equality where answers are few.

Blockwise, n continuations of ``block`` tokens are drawn at a time, and the answer goes on from the best
(Mudgal et al. 2024): the same law in each block, of the scores of the beginnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import BatchSize, Count, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.continuing import Drawing, Responses, answer_noise, draw_answers, draw_until
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
    block: Count | None = None  # tokens that are drawn before each choice; null: a whole answer

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
        score = _mean_log_prob
        if self.reward is not None:
            repeated = prompt_tokens[rows], prompt_mask[rows]
            of_samples = score_of(self.reward, *repeated, eos_ids, tokenizer)
            score = lambda said: of_samples(said.samples)  # noqa: E731
        settings, ends, block = Static(self), tuple(eos_ids), self.block or self.max_new_tokens
        length, end = self.max_new_tokens, min(block, self.max_new_tokens)
        inputs = (model, params, prompt_tokens, prompt_mask, key, ends)
        drawing = _first_block(*inputs, self.n, length, self.temperature, end)
        while end < length:
            best = self._chosen(score(drawing.said), jax.random.fold_in(last, end))
            begin, end = end, min(end + block, length)
            drawing = _taken(drawing, jnp.repeat(best, self.n))
            drawing = _next_block(settings, model, params, drawing, key, ends, begin, end)
        best = self._chosen(score(drawing.said), last)
        return jax.tree.map(lambda x: x[best], drawing.said.samples)

    def _chosen(self, scores: Float[Array, "N"], key: Array) -> Int[Array, "B"]:
        """The row of the best answer to each prompt."""
        scores = scores.reshape(-1, self.n)
        check_scores(scores, jnp.max(scores, axis=1))
        if self.softness is not None:
            # The largest of scores with Gumbel noise is a draw from their softmax.
            scores = scores / self.softness + jax.random.gumbel(key, scores.shape)
        return jnp.arange(len(scores)) * self.n + jnp.argmax(scores, axis=1)


def _mean_log_prob(said: Responses) -> Float[Array, "N"]:
    return jnp.sum(said.log_probs, axis=1) / said.lengths


@partial(jax.jit, static_argnames=("settings", "model", "eos_ids"))
def _next_block(
    settings: Static[BestOfN], model, params, drawing: Drawing, key, eos_ids, begin, end
) -> Drawing:
    params, sampler = model.cast(params), settings.value
    logits, cache = model.step(params, drawing.token, drawing.cache)
    noise = answer_noise(key, len(drawing.token), sampler.max_new_tokens)
    drawing = replace(drawing, cache=cache)
    return draw_until(end, model, params, drawing, logits, noise, begin, sampler.temperature, eos_ids)


_first_block = partial(
    jax.jit, static_argnames=("model", "eos_ids", "n", "max_new_tokens", "temperature", "end")
)(draw_answers)
_taken = jax.jit(Drawing.take)
