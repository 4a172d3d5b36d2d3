"""Metropolis-Hastings over whole responses (Metropolis 1953, Hastings 1970; powers: Karan and Du 2025).

    π(y) ∝ p(y)^α · exp(r(y) / β)

A move draws a cut k of a response y, uniform over its tokens, keeps what stands before and draws the rest from
the proposal q, the model at another temperature. The new response y' is taken with the probability

    min(1, π(y') q(y_≥k | y_<k) / |y'|  /  (π(y) q(y'_≥k | y_<k) / |y|))

Lengths differ where a response can end, and so does the probability 1/|y| of a cut: without that part the chain
has another distribution. α = 1 with r draws from the optimum of KL-regularised reward; α > 1 sharpens whole
responses, which a low temperature does not: that sharpens each token by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import choose_rows
from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import Count, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.continuing import Responses, continue_from, read_prompts
from hybrid_jax.sampling.diagnostics import autocorrelation_time, r_hat_of_prompts
from hybrid_jax.sampling.logits import response_keys, response_noise
from hybrid_jax.sampling.scoring import ChoosesByReward, Score, check_scores, score_of

log = logging.getLogger(__name__)


@struct.dataclass
class Chain:
    """The state of a chain a row."""

    response: Responses
    score: Float[Array, "B"]

    def log_target(self, alpha: float, beta: float) -> Float[Array, "B"]:
        """The logarithm of π, up to a constant."""
        return alpha * jnp.sum(self.response.log_probs, axis=1) + self.score / beta


@struct.dataclass
class Moves:
    """The record of a chain's moves."""

    taken: Bool[Array, "M B"]
    scores: Float[Array, "M B"]  # of the proposals
    tokens: Int[Array, "M B"]  # of the proposals: each reads so many
    log_target: Float[Array, "M B"]  # of the states


@SAMPLERS.register("metropolis")
@settings
class Metropolis(ChoosesByReward):
    """The last state of a Markov chain whose distribution tends to ``p(y)^alpha exp(reward / beta)``."""

    max_new_tokens: Count = 64  # longest response
    moves: Count = 32  # of a chain; each reads as many tokens as an answer
    alpha: Positive = 1.0  # power of the model's own probability of a whole response
    reward: Annotated[Any, REWARDS] | None = None  # of a response; null: none
    beta: Positive = 1.0  # that the reward is divided by
    proposal_temperature: Positive | None = None  # of the tokens that a move draws; null: 1 / alpha

    @property
    def temperature(self) -> float:
        """Divisor of the logits that a move draws from."""
        return self.proposal_temperature or 1.0 / self.alpha

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
        inputs = (model, params, prompt_tokens, prompt_mask, key)
        if self.reads_texts:
            score = score_of(self.reward, prompt_tokens, prompt_mask, eos_ids, tokenizer)
            chain, moves = self.chain(*inputs, tuple(eos_ids), score, _scan_on_host)
        else:
            chain, moves = _on_device(Static(self), *inputs, tuple(eos_ids))
        check_scores(moves.scores, chain.score)
        if not isinstance(moves.taken, Tracer):  # not within a function that is being traced
            self._log(chain, moves, jnp.where(prompt_mask, prompt_tokens, -1))
        return chain.response.samples

    def _log(self, chain: Chain, moves: Moves, prompts: Int[Array, "B P"]) -> None:
        """Says how far the chains have moved."""
        states = np.asarray(moves.log_target)
        states = states[np.isfinite(states).all(axis=1)]  # from where no chain is in a forbidden answer
        r_hat = r_hat_of_prompts(states, np.asarray(prompts))
        log.info(
            "metropolis: %.0f%% of %d moves were taken, autocorrelation time %.3g moves%s, "
            "%.3g tokens read for one in an answer",
            100 * float(jnp.mean(moves.taken)),
            self.moves,
            autocorrelation_time(states),
            "" if r_hat is None else f", split R-hat {r_hat:.3g} at most",
            1 + float(jnp.sum(moves.tokens) / jnp.sum(chain.response.lengths)),
        )

    def chain(
        self, model, params, prompts, mask, key, eos_ids, score: Score, scan: Any = lax.scan
    ) -> tuple[Chain, Moves]:
        """The last state of the chain of each row, and its moves."""
        length, params = self.max_new_tokens, model.cast(params)
        keys = response_keys(key, jnp.arange(len(prompts)))
        prompted = _read(model, params, prompts, mask, length)
        nothing = jnp.zeros((len(prompts), length), jnp.int32)

        def propose(number, given, num_given):
            noise = response_noise(jax.vmap(lambda row: jax.random.fold_in(row, 2 * number))(keys), length)
            said = _continue(model, params, prompted, given, num_given, noise, self.temperature, eos_ids)
            return Chain(said, score(said.samples))

        def move(chain, number):
            uniform = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(row, 2 * number + 1), (2,)))(
                keys
            )
            cut = jnp.floor(uniform[:, 0] * chain.response.lengths).astype(jnp.int32)
            proposal = propose(number, chain.response.tokens, cut)
            taken = jnp.log(uniform[:, 1]) < log_acceptance(chain, proposal, cut, self.alpha, self.beta)
            chain = choose_rows(taken, proposal, chain)
            target = chain.log_target(self.alpha, self.beta)
            return chain, Moves(taken, proposal.score, proposal.response.lengths, target)

        start = propose(0, nothing, jnp.zeros(len(prompts), jnp.int32))
        return scan(move, start, jnp.arange(1, self.moves + 1))


def log_acceptance(
    now: Chain, proposal: Chain, cut: Int[Array, "B"], alpha: float, beta: float
) -> Float[Array, "B"]:
    """The logarithm of the ratio above; a move is taken with its exponential, if that is below 1."""
    behind = jnp.arange(now.response.tokens.shape[1]) >= cut[:, None]

    def log_move_to(chain: Chain, from_length: Array) -> Array:
        """The log-probability of the cut, and of what is drawn behind it."""
        drawn = jnp.sum(jnp.where(behind, chain.response.drawn_log_probs, 0.0), axis=1)
        return drawn - jnp.log(from_length)

    back = log_move_to(now, proposal.response.lengths)
    gained = proposal.log_target(alpha, beta) - now.log_target(alpha, beta)
    return gained + back - log_move_to(proposal, now.response.lengths)


_read = partial(jax.jit, static_argnames=("model", "new_tokens"))(read_prompts)
_continue = partial(jax.jit, static_argnames=("model", "temperature", "eos_ids"))(continue_from)


@partial(jax.jit, static_argnames=("settings", "model", "eos_ids"))
def _on_device(settings: Static[Metropolis], model, params, prompts, mask, key, eos_ids):
    sampler = settings.value
    score = score_of(sampler.reward, prompts, mask, eos_ids, None)
    return sampler.chain(model, params, prompts, mask, key, eos_ids, score)


def _scan_on_host(move: Any, chain: Chain, numbers: Int[Array, "M"]) -> tuple[Chain, Any]:
    """`jax.lax.scan` for a move that reads texts."""
    found = []
    for number in numbers:
        chain, told = move(chain, number)
        found.append(told)
    return chain, jax.tree.map(lambda *each: jnp.stack(each), *found)
