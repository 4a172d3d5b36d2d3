"""Guidance: every token is drawn by how likely it is and by what the beginning with it is worth.

    q(token | y) ∝ p(token | y) · exp(v(y, token) / β)        over the k likeliest tokens

v is a reward of the beginning (ARGS, Khanov et al. 2024), or a learned value of it (FUDGE, Yang and Klein
2021). With the soft value v(y) = β log E[exp(r / β) | y] and k the whole vocabulary these are draws from the
optimum of KL-regularised reward, π*(y) ∝ p(y) exp(r(y) / β). The k candidates are scored in k rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.batches import Samples
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, Positive, settings
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.classifier import Classifier, load_classifier
from hybrid_jax.models.layers import linear
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.sampling.base import SAMPLERS, Static, check_fits
from hybrid_jax.sampling.continuing import answer_noise, read_prompts
from hybrid_jax.sampling.logits import draw, is_end
from hybrid_jax.sampling.scoring import ChoosesByReward, Score, check_scores, score_of


@struct.dataclass
class Guided:
    """Responses that are being drawn."""

    cache: Any  # of the model
    token: Int[Array, "B"]  # the last one, which the model has not read
    busy: Bool[Array, "B"]  # whether the response goes on
    samples: Samples
    judged: Any  # what the judge of beginnings keeps
    worst: Float[Array, "B"]  # score of the best candidate, at the token where that was lowest


@dataclass(frozen=True)
class ByReward:
    """Judges the beginning with a candidate by a reward."""

    reward: Score

    def begin(self, prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], length: int) -> Any:
        """An empty state: rewards are computed anew for each candidate."""
        return ()

    def score(self, kept: Any, samples: Samples, t, tokens: Int[Array, "B k"], ends) -> tuple[Array, Any]:
        """The score of each of k candidates for token t, and the state with each."""
        rows = jax.tree.map(lambda x: jnp.repeat(x, tokens.shape[1], axis=0), samples)
        token = tokens.reshape(-1)
        return self.reward(_with_token(rows, t, token, 0.0, token >= 0)).reshape(tokens.shape), kept

    def choose(self, kept: Any, choice: Int[Array, "B"]) -> Any:
        """The state of the chosen candidates."""
        return kept


@dataclass(frozen=True)
class ByValue:
    """Judges the beginning with a candidate by a value function, which reads it from a cache of its own.

    No value has learned what stands behind an end: a token that ends is worth what the response before it is.
    """

    critic: Classifier
    params: Params

    def begin(self, prompts: Int[Array, "B P"], mask: Bool[Array, "B P"], length: int) -> Any:
        """A cache that has read the prompts, and their values."""
        empty = self.critic.backbone.init_cache(len(prompts), prompts.shape[1] + length)
        values, cache = self.read(prompts, mask, empty)
        return cache, values

    def score(self, kept: Any, samples: Samples, t, tokens: Int[Array, "B k"], ends) -> tuple[Array, Any]:
        """As `ByReward.score`."""
        (cache, now), (batch, size) = kept, tokens.shape
        token = tokens.reshape(-1, 1)
        values, cache = self.read(token, token >= 0, cache.take(jnp.repeat(jnp.arange(batch), size)))
        values = jnp.where(ends, now[:, None], values.reshape(batch, size))
        return values, (cache, values)

    def choose(self, kept: Any, choice: Int[Array, "B"]) -> Any:
        """As `ByReward.choose`."""
        cache, values = kept
        rows = jnp.arange(len(choice)) * values.shape[1] + choice
        return cache.take(rows), values.reshape(-1)[rows]

    def read(self, tokens, mask, cache) -> tuple[Float[Array, "N"], Any]:
        """The values of beginnings that go on with these tokens, and the cache that has read them."""
        hidden, cache = self.critic.backbone.read_on(self.params, tokens, mask, cache)
        score = self.params["score"]
        return linear(hidden[:, -1].astype(jnp.float32), score["kernel"], score.get("bias"))[:, 0], cache


@SAMPLERS.register("guidance")
@settings
class Guidance(ChoosesByReward):
    """Draws each token from ``p(token) exp(v / beta)`` over its ``candidates`` likeliest ones."""

    max_new_tokens: Count = 64  # longest response
    candidates: BatchSize = 16  # likeliest tokens that are scored; others are not drawn
    reward: Annotated[Any, REWARDS] | None = None  # of a beginning; this or a value
    value: str | None = None  # folder of a value function, as an export of a run writes it
    beta: Positive = 1.0  # that the reward or the value is divided by
    temperature: NonNegative = 1.0  # divisor of log p + v / beta; 0 takes the best candidate

    def __post_init__(self):
        if (self.reward is None) == (self.value is None):
            raise ValueError("guidance needs a reward or a value, one of them")

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
        inputs = (model, params, prompt_tokens, prompt_mask, key, tuple(eos_ids))
        if self.value is not None:
            critic, critic_params = read_value(self.value, model, prompt_tokens.shape[1], self.max_new_tokens)
            guided = _by_value(Static(self), critic, critic_params, *inputs)
        elif self.reads_texts:
            judge = ByReward(self.score(model, prompt_tokens, prompt_mask, eos_ids, tokenizer))
            guided = self.draw(judge, *inputs, _while_on_host)
        else:
            guided = _by_reward(Static(self), *inputs)
        check_scores(guided.worst, guided.worst)
        return guided.samples

    def score(self, model: LanguageModel, prompts, mask, eos_ids, tokenizer=None) -> Score:
        """The reward of the candidates of all rows, those of one row one after the other."""
        rows = jnp.repeat(jnp.arange(len(prompts)), min(self.candidates, model.vocab_size))
        return score_of(self.reward, prompts[rows], mask[rows], eos_ids, tokenizer)

    def draw(
        self,
        judge: ByReward | ByValue,
        model: LanguageModel,
        params: Params,
        prompts: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
        key: Array,
        eos_ids: tuple[int, ...],
        loop: Callable[..., Any] = lax.while_loop,
    ) -> Guided:
        """The responses, by a judge of beginnings; the loop is that of jax, or one on the host."""
        params, rows, length = model.cast(params), len(prompts), self.max_new_tokens
        size = min(self.candidates, model.vocab_size)
        noise = answer_noise(key, rows, length)
        prompted = _read_prompts(model, params, prompts, mask, length)

        def write(t, logits, state: Guided) -> Guided:
            log_probs, tokens = lax.top_k(jax.nn.log_softmax(logits.astype(jnp.float32)), size)
            scores, kept = judge.score(state.judged, state.samples, t, tokens, is_end(tokens, eos_ids))
            choice, log_prob = guided_choice(log_probs, scores, noise[:, t], self.beta, self.temperature)
            token = jnp.take_along_axis(tokens, choice[:, None], 1)[:, 0]
            best = jnp.where(state.busy, jnp.max(scores, axis=1), jnp.inf)
            return replace(
                state,
                token=token,
                samples=_with_token(state.samples, t, token, log_prob, state.busy),
                busy=state.busy & ~is_end(token, eos_ids),
                judged=judge.choose(kept, choice),
                worst=jnp.minimum(state.worst, best),
            )

        def step(carry):
            t, state = carry
            logits, cache = _step(model, params, state.token, state.cache)
            return t + 1, write(t, logits, replace(state, cache=cache))

        start = Guided(
            prompted.cache,
            jnp.zeros(rows, jnp.int32),
            jnp.ones(rows, bool),
            Samples.empty(rows, length),
            judge.begin(prompts, mask, length),
            jnp.full(rows, jnp.inf),
        )
        unfinished = lambda carry: (carry[0] < length) & jnp.any(carry[1].busy)  # noqa: E731
        return loop(unfinished, step, (jnp.int32(1), write(0, prompted.logits, start)))[1]


def guided_choice(
    log_probs: Float[Array, "B k"],
    scores: Float[Array, "B k"],
    noise: Float[Array, "B 2"],
    beta: float,
    temperature: float,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one of k candidates a row; returns its place and its log-probability among them."""
    guided = log_probs + scores / beta
    if temperature == 0:
        return jnp.argmax(guided, axis=1), jnp.zeros(len(guided))
    return draw(guided / temperature, noise)


def _with_token(samples: Samples, t, token: Int[Array, "B"], log_prob, busy: Bool[Array, "B"]) -> Samples:
    """The samples with one token more, of rows that are busy."""
    mask = samples.action_mask.at[:, t].set(busy)
    tokens = samples.tokens.at[:, t].set(jnp.where(busy, token, 0))
    assert samples.log_probs is not None
    return Samples.chosen(tokens, samples.log_probs.at[:, t].set(jnp.where(busy, log_prob, 0.0)), mask)


@partial(jax.jit, static_argnames=("settings", "model", "eos_ids"))
def _by_reward(settings: Static[Guidance], model, params, prompts, mask, key, eos_ids) -> Guided:
    sampler = settings.value
    judge = ByReward(sampler.score(model, prompts, mask, eos_ids))
    return sampler.draw(judge, model, params, prompts, mask, key, eos_ids)


@partial(jax.jit, static_argnames=("settings", "critic", "model", "eos_ids"))
def _by_value(
    settings: Static[Guidance], critic, critic_params, model, params, prompts, mask, key, eos_ids
) -> Guided:
    judge = ByValue(critic, critic.cast(critic_params))
    return settings.value.draw(judge, model, params, prompts, mask, key, eos_ids)


def read_value(
    folder: str, model: LanguageModel, prompt_length: int, new_tokens: int
) -> tuple[Classifier, Params]:
    """The value function of a folder, for the beginnings of a model's responses.

    Raises:
        UserError: it has other tokens than the model, several labels, or no room for prompts and responses.
    """
    critic, params = _critic(folder)
    if critic.num_labels != 1 or critic.vocab_size != model.vocab_size:
        raise UserError(
            f"sampler.value must have one label and the model's {model.vocab_size} tokens, got "
            f"{critic.num_labels} and {critic.vocab_size} in {folder}"
        )
    check_fits(critic.backbone, prompt_length, new_tokens, ())
    return critic, params


@cache
def _critic(folder: str) -> tuple[Classifier, Params]:
    with jax.ensure_compile_time_eval():  # arrays, also where the caller is being traced
        return load_classifier(folder)


_read_prompts = partial(jax.jit, static_argnames=("model", "new_tokens"))(read_prompts)
_step = partial(jax.jit, static_argnames=("model",))(lambda model, *inputs: model.step(*inputs))


def _while_on_host(goes_on: Callable[[Any], Any], step: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop` for a step that reads texts."""
    while goes_on(carry):
        carry = step(carry)
    return carry
