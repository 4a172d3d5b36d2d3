"""Sequential Monte Carlo: particles that are weighted after every token and resampled (Zhao et al. 2024).

    π(y) ∝ p(y)^α · exp(r(y) / β)            the same as `metropolis`

Each prompt has n particles, which draw from the model at temperature 1/α. After a token the logarithm of a
weight grows by α log p − log q, and by what the reward of the response so far has grown, over β; the reward of
a whole response is the target, that of a beginning only guides. Where the effective number of particles,
(Σw)² / Σw², falls below a share of n they are resampled, systematically. The product of the mean weights is an
unbiased estimate of Z, the sum of what stands above over all y.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Interval
from flax import struct
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.ranges import BatchSize, Count, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.continuing import read_prompts
from hybrid_jax.sampling.diagnostics import effective_number
from hybrid_jax.sampling.logits import draw, is_end, response_keys, response_noise, scale_by_temperature
from hybrid_jax.sampling.scoring import ChoosesByReward, check_scores, reads_texts, score_of

log = logging.getLogger(__name__)


@struct.dataclass
class Swarm:
    """Particles, n a prompt one after the other, and their weights."""

    tokens: Int[Array, "N R"]
    mask: Bool[Array, "N R"]
    log_weights: Float[Array, "N"]  # since they were resampled last
    potential: Float[Array, "N"]  # reward of the response so far, over β
    log_z: Float[Array, "B"]  # of the resamplings before
    drawn: Int[Array, "B"]  # tokens, those of particles that are gone counted

    @property
    def samples(self) -> Samples:
        """The responses so far."""
        return Samples(self.tokens, None, self.mask, self.mask)


@SAMPLERS.register("particles")
@settings
class Particles(ChoosesByReward):
    """One of ``n`` particles, drawn by their weights: from ``p(y)^alpha exp(reward / beta)`` as n grows."""

    max_new_tokens: Count = 64  # longest response
    n: BatchSize = 16  # particles of a prompt
    alpha: Positive = 1.0  # power of the model's own probability of a whole response
    reward: Annotated[Any, REWARDS] | None = None  # of a response; null: none
    beta: Positive = 1.0  # that the reward is divided by
    guided: bool = False  # weighs beginnings by their reward, too; of a reward on tokens
    resample_below: Annotated[float, Interval(ge=0, le=1)] = 0.5  # share of n that is effective yet; 0: never

    def __post_init__(self):
        if self.guided and (self.reward is None or reads_texts(self.reward)):
            raise ValueError("guided needs a reward on tokens, such as token_count")

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
        key, last = jax.random.split(key)
        swarm = self.swarm(model, params, prompt_tokens, prompt_mask, key, eos_ids, tokenizer)
        constants = log_constant(swarm)
        check_scores(swarm.potential, constants)
        constant = jnp.mean(constants)
        if not isinstance(constant, Tracer):  # not within a function that is being traced
            log.info("particles: log Z is about %.3f, the mean of %d prompts", constant, len(prompt_tokens))
        weights = swarm.log_weights.reshape(-1, self.n)
        noise = jax.random.uniform(last, (len(weights), 2))
        chosen, _ = draw(weights, noise)
        samples = jax.tree.map(lambda x: x[jnp.arange(len(weights)) * self.n + chosen], swarm.samples)
        if not isinstance(constant, Tracer):
            log.info(
                "particles: %.3g of %d are effective at the end, %.3g tokens drawn for one in an answer",
                jnp.mean(effective_number(weights)),
                self.n,
                jnp.sum(swarm.drawn) / jnp.sum(samples.action_mask),
            )
        return samples

    def swarm(self, model, params, prompts, mask, key, eos_ids=(), tokenizer=None) -> Swarm:
        """All particles with their final weights."""
        check_fits(model, prompts.shape[1], self.max_new_tokens, eos_ids)
        swarm = _moved(Static(self), model, params, prompts, mask, key, tuple(eos_ids))
        rows = jnp.repeat(jnp.arange(len(prompts)), self.n)
        score = score_of(self.reward, prompts[rows], mask[rows], eos_ids, tokenizer)(swarm.samples) / self.beta
        return _weighed(swarm, score)


def log_constant(swarm: Swarm) -> Float[Array, "B"]:
    """The estimate of log Z of each prompt."""
    weights = swarm.log_weights.reshape(len(swarm.log_z), -1)
    return swarm.log_z + _log_mean(weights)


@partial(jax.jit, static_argnames=("settings", "model", "eos_ids"))
def _moved(settings: Static[Particles], model, params, prompts, mask, key, eos_ids) -> Swarm:
    sampler = settings.value
    params, size, length = model.cast(params), sampler.n, sampler.max_new_tokens
    read = read_prompts(model, params, prompts, mask, length)
    rows = jnp.repeat(jnp.arange(len(prompts)), size)
    count = len(rows)
    key, resampling = jax.random.split(key)
    noise = response_noise(response_keys(key, jnp.arange(count)), length)
    uniform = jax.random.uniform(resampling, (len(prompts), length))  # of a prompt, however many there are
    score = score_of(sampler.reward if sampler.guided else None, prompts[rows], mask[rows], eos_ids, None)
    zeros = jnp.zeros(count)
    swarm = Swarm(
        tokens=jnp.zeros((count, length), jnp.int32),
        mask=jnp.zeros((count, length), bool),
        log_weights=zeros,
        potential=zeros,
        log_z=jnp.zeros(len(prompts)),
        drawn=jnp.zeros(len(prompts), jnp.int32),
    )

    def drawn(t, logits, cache, busy, swarm):
        scaled = scale_by_temperature(logits, 1.0 / sampler.alpha)
        token, log_q = draw(scaled, noise[:, t])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), token[:, None], 1)[:, 0]
        swarm = replace(
            swarm,
            tokens=swarm.tokens.at[:, t].set(jnp.where(busy, token, 0)),
            mask=swarm.mask.at[:, t].set(busy),
            drawn=swarm.drawn + jnp.sum(busy.reshape(-1, size), axis=1),
        )
        potential = score(swarm.samples) / sampler.beta
        gained = jnp.where(busy, sampler.alpha * log_p - log_q, 0.0)
        swarm = _weighed(replace(swarm, log_weights=swarm.log_weights + gained), potential)
        busy = busy & ~is_end(token, eos_ids)
        parents, swarm = _resampled(swarm, size, sampler.resample_below, uniform[:, t])
        # A cache is large: its rows move only where a particle was resampled.
        moved = jnp.any(parents != jnp.arange(count))
        cache = lax.cond(moved, lambda: cache.take(parents), lambda: cache)
        return t + 1, token[parents], cache, busy[parents], swarm

    def step(carry):
        t, token, cache, busy, swarm = carry
        logits, cache = model.step(params, token, cache)
        return drawn(t, logits, cache, busy, swarm)

    def unfinished(carry):
        t, _, _, busy, _ = carry
        return (t < length) & jnp.any(busy)

    start = drawn(jnp.int32(0), read.logits[rows], read.cache.take(rows), jnp.ones(count, bool), swarm)
    return lax.while_loop(unfinished, step, start)[-1]


def _weighed(swarm: Swarm, potential: Float[Array, "N"]) -> Swarm:
    """The swarm whose weights hold another potential; a particle that was without weight stays so."""
    before = jnp.where(jnp.isneginf(swarm.potential), 0.0, swarm.potential)
    return replace(swarm, log_weights=swarm.log_weights + potential - before, potential=potential)


def _resampled(
    swarm: Swarm, size: int, below: float, uniform: Float[Array, "B"]
) -> tuple[Int[Array, "N"], Swarm]:
    """The parent of each particle, itself where none was resampled, and the swarm of the children."""
    weights = jax.nn.softmax(swarm.log_weights.reshape(-1, size), axis=1)
    needed = effective_number(swarm.log_weights.reshape(-1, size)) < below * size
    # One uniform number places n equally distant marks: a particle has n·w children, rounded up or down.
    marks = (jnp.arange(size) + uniform[:, None]) / size
    ends = jnp.cumsum(weights, axis=1)
    ends = ends / ends[:, -1:]  # exactly 1 from the last particle with a weight on
    parents = jax.vmap(lambda end, mark: jnp.searchsorted(end, mark, side="right"))(ends, marks)
    parents = jnp.where(needed[:, None], jnp.minimum(parents, size - 1), jnp.arange(size))
    rows = (jnp.arange(len(weights))[:, None] * size + parents).reshape(-1)
    mean = _log_mean(swarm.log_weights.reshape(-1, size))
    fresh = jnp.repeat(needed, size)
    swarm = replace(
        swarm,
        tokens=swarm.tokens[rows],
        mask=swarm.mask[rows],
        potential=swarm.potential[rows],
        log_weights=jnp.where(fresh, 0.0, swarm.log_weights[rows]),
        log_z=swarm.log_z + jnp.where(needed, mean, 0.0),
    )
    return rows, swarm


def _log_mean(log_weights: Float[Array, "B n"]) -> Float[Array, "B"]:
    return jax.nn.logsumexp(log_weights, axis=1) - jnp.log(log_weights.shape[1])
