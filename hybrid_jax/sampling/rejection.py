"""Rejection sampling from the optimum of KL-regularised reward (RSO, Liu et al. 2023).

    π*(y) ∝ p(y) · exp(r(y) / β)

An answer y that the model draws is accepted with the probability exp((r(y) − r_max) / β), where no reward is
above r_max: the accepted ones are draws from π*, exactly. Where r_max is not known, the largest reward of the
draws for a prompt stands for it, and the law is only about π*.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, Finite, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, check_fits
from hybrid_jax.sampling.continuing import draw_answers
from hybrid_jax.sampling.scoring import ChoosesByReward, check_scores, score_of

log = logging.getLogger(__name__)


@SAMPLERS.register("rejection")
@settings
class Rejection(ChoosesByReward):
    """The first of ``n`` draws that is accepted; where none is, one of them by weights exp(reward / beta)."""

    reward: Annotated[Any, REWARDS]  # of an answer
    max_new_tokens: Count = 64  # longest response
    n: BatchSize = 32  # draws for a prompt
    beta: Positive = 1.0  # that the reward is divided by
    most: Finite | None = None  # no reward is larger; null: the largest among the draws for a prompt

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
        inputs = (model, params, prompt_tokens, prompt_mask, key, tuple(eos_ids))
        samples = _drawn(*inputs, self.n, self.max_new_tokens).said.samples
        score = score_of(self.reward, prompt_tokens[rows], prompt_mask[rows], eos_ids, tokenizer)
        scores = score(samples).reshape(-1, self.n)
        best = jnp.max(scores, axis=1)
        check_scores(scores, best)
        chosen, accepted = self.choose(scores, last)
        if not isinstance(best, Tracer):  # not within a function that is being traced
            if self.most is not None and jnp.any(best > self.most):
                raise UserError(
                    f"sampler.most must be at least every reward, got {self.most} and a reward of {best.max()}"
                )
            left = int(jnp.sum(~jnp.any(accepted, axis=1)))
            log.info(
                "rejection: %.1f%% of %d draws were accepted", 100 * float(jnp.mean(accepted)), accepted.size
            )
            if left:
                log.warning(
                    "rejection: none of the %d draws for %d of %d prompts was accepted, one was taken by "
                    "weights; raise sampler.n or sampler.beta",
                    self.n, left, len(best),
                )  # fmt: skip
        picked = jnp.arange(len(scores)) * self.n + chosen
        return jax.tree.map(lambda x: x[picked], samples)

    def choose(self, scores: Float[Array, "B n"], key: Array) -> tuple[Int[Array, "B"], Bool[Array, "B n"]]:
        """Which draw for each prompt is given, and which are accepted."""
        key, by_weight = jax.random.split(key)
        uniform = jax.random.uniform(key, scores.shape)
        accepted = uniform < acceptance(scores, self.beta, self.most)
        weighted = jnp.argmax(scores / self.beta + jax.random.gumbel(by_weight, scores.shape), axis=1)
        return jnp.where(jnp.any(accepted, axis=1), jnp.argmax(accepted, axis=1), weighted), accepted


def acceptance(scores: Float[Array, "B n"], beta: float, most: float | None) -> Float[Array, "B n"]:
    """The probability that each draw is accepted."""
    largest = jnp.max(scores, axis=1, keepdims=True) if most is None else most
    return jnp.exp((scores - largest) / beta)


_drawn = partial(jax.jit, static_argnames=("model", "eos_ids", "n", "max_new_tokens"))(draw_answers)
