"""Proximal policy optimisation of a language model.

One step: sample responses, score them with the value and reference models, reward them, turn rewards into
advantages, and take ``epochs × minibatches`` clipped updates:

    R_t = −β (log π_old(y_t) − log π_ref(y_t)) + [t last] · score        A, G = GAE(R, V)
    L   = mean max(−A ρ, −A clip(ρ, 1 ± ε))
        + c_v ½ mean max((V − G)², (clip(V, V_old ± ε_v) − G)²) − c_H mean H

The KL to the reference is the single-sample k1 in the reward and nowhere else. As a loss, k1 has zero expected
gradient, so it is no penalty at all; k3 as a loss pulls to another optimum (that of the forward KL), and k3 in
the reward can diverge. So none of them is a setting (tests/algorithms proves these statements on a bandit).

Here are the settings and the host's side of a step; the pure functions that it calls are in `ppo_functions`.

Sources: Schulman et al. 2017 (arXiv 1707.06347), Ziegler et al. 2019 (1909.08593), Ouyang et al. 2022
(2203.02155).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybrid_jax.algorithms.kl_control import KL_CONTROLS, FixedKL, KLControl
from hybrid_jax.core.batches import PromptBatch, Samples, TokenBatch
from hybrid_jax.core.registry import UserError
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.models.base import Params
from hybrid_jax.models.encoder_decoder import EncoderDecoder
from hybrid_jax.phases.ppo_functions import PPOFunctions, Scored
from hybrid_jax.phases.sft import SFT, sft_stream
from hybrid_jax.rewards.base import columns_of
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.decode import Sampler
from hybrid_jax.sampling.responses import decode_responses
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Linear, Optimizer
from hybrid_jax.training.phase import PHASES, Metrics, PhaseInit, Resources
from hybrid_jax.training.state import RunState


@dataclass(frozen=True)
class Reference:
    """A frozen copy of the policy that holds the trained one back."""

    weight: float = 1.0
    frozen_at: Literal["start", "first_step"] = (
        "first_step"  # of the run, or of this phase (the SFT checkpoint)
    )
    refresh_every_cycles: int | None = None  # copy the policy again each time this phase was entered n times

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if self.refresh_every_cycles is not None and self.refresh_every_cycles < 1:
            raise ValueError(f"refresh_every_cycles must be at least 1, got {self.refresh_every_cycles}")

    def is_due(self, cycle: int, entered: bool) -> bool:
        """Whether to copy the policy again at the start of a step; ``cycle`` counts the entries before it."""
        return self.refresh_every_cycles is not None and entered and cycle % self.refresh_every_cycles == 0


@dataclass(frozen=True)
class SFTMix:
    """Examples mixed into every PPO update: PPO-ptx (Ouyang et al. 2022), ``+ coef · cross-entropy``."""

    coef: float
    batch_size: int = 16  # rows a minibatch
    length: int = 256
    packing: bool = True

    def __post_init__(self):
        if self.coef <= 0:
            raise ValueError(f"coef must be positive, got {self.coef}")

    def as_sft(self) -> SFT:
        return SFT(batch_size=self.batch_size, length=self.length, packing=self.packing)


@PHASES.register("ppo")
@dataclass(frozen=True)
class PPO:
    """Settings of PPO; the defaults are those that work for most language models."""

    reward: CompositeReward
    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    max_prompt_length: int | None = None  # tokens; None takes what the model's context leaves
    sampler: Sampler = Sampler(max_new_tokens=64)
    source: Annotated[Any, SOURCES] | None = None  # prompts of its own; None takes the run's

    epochs: int = 4
    minibatches: int = 1
    microbatches: int = 1  # parts in which a minibatch is read, to save memory; the gradient is the same
    discount: float = 1.0
    trace: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = 1.0  # taken from the score of a response that did not end by itself
    target_kl: float | None = None  # stop the updates of a step once the policy moved this far (nats a token)
    kl_control: Annotated[KLControl, KL_CONTROLS] = FixedKL(0.05)
    references: dict[str, Reference] = field(default_factory=lambda: {"sft": Reference()})

    value_network: Literal["shared", "separate"] = "shared"  # a head on the policy, or a network of its own
    value_warmup_steps: int = 0  # steps that train only the value
    sft_mix: SFTMix | None = None
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(
        learning_rate=1e-5, schedule=Linear(), epsilon=1e-5, weight_decay=0.0
    )

    def __post_init__(self):
        for name in ("prompts_per_step", "samples_per_prompt", "epochs", "minibatches", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("clip_range", "value_clip_range", "target_kl"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rows % (self.minibatches * self.microbatches):
            raise ValueError(
                "minibatches × microbatches must divide the prompts_per_step × samples_per_prompt = "
                f"{self.rows} responses, got {self.minibatches} × {self.microbatches}"
            )
        if self.sampler.top_k is not None or self.sampler.top_p is not None or self.sampler.temperature == 0:
            raise ValueError(
                "sampler must not truncate (top_k, top_p) or be greedy: PPO learns from the distribution "
                "that it samples, over the whole vocabulary"
            )

    @property
    def rows(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def build(self, resources: Resources) -> PPOPhase:
        return PPOPhase(self, resources)


class PPOPhase:
    """Steps of PPO. Trains the groups "model" and "value"."""

    waits_for_device = True

    def __init__(self, config: PPO, resources: Resources):
        self.config = config
        self.name = resources.name
        self.optimizer_key = resources.optimizer_key
        self.functions = PPOFunctions(config, resources.model, resources.eos_ids, self.name, self.optimizer_key)
        self._tokenizer = resources.tokenizer
        self._horizon = resources.horizon
        self._mesh = resources.mesh
        self.prompts = prompt_stream(config, resources)
        self._examples = sft_stream(config.sft_mix.as_sft(), resources) if config.sft_mix else None
        self._rate = jax.jit(config.optimizer.rate)
        self._sample = jax.jit(self._above_base("sample"))
        self._score = jax.jit(self._above_base("score"))
        self._learn = jax.jit(self._above_base("learn"), donate_argnums=1, static_argnames="groups")

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        start = {n: r for n, r in self.config.references.items() if r.frozen_at == "start"}
        groups = {"model": params["model"], "value": self.functions.init_value(params["model"])}
        transform = self.config.optimizer.transform()
        return PhaseInit(
            params={"value": groups["value"]},
            opt_state={group: transform.init(tree) for group, tree in groups.items()},
            extra={self.functions.kl_key: self.config.kl_control.init()},
            host={f"{self.name}/reward": self.config.reward.init()},
            references={name: _copy(params["model"]) for name in start},
        )

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        started = time.perf_counter()
        state = self._enter(state)
        steps, cursor = state.schedule.steps.get(self.name, 0), state.cursors.get(self.name, 0)
        prompts = _repeat(
            self.prompts.batch(cursor, self.config.prompts_per_step), self.config.samples_per_prompt
        )
        sample_key, learn_key = jax.random.split(key)
        tokens, mask = self._mesh.split((prompts.tokens, prompts.mask))
        samples = self._sample(state.base, state.train.params["model"], tokens, mask, sample_key)
        scored = self._score(state.base, state.train.params, dict(state.references), tokens, mask, samples)

        scores, reward_state, host_metrics = self._reward(state, prompts, samples, scored)
        groups = ("value",) if steps < self.config.value_warmup_steps else ("model", "value")
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        examples = self._example_batch(state.cursors.get(f"{self.name}/examples", 0))
        train, metrics = self._learn(
            state.base, state.train, scored, scores, examples, learn_key, rate, groups=groups
        )
        state = replace(
            state,
            train=train,
            host={**state.host, f"{self.name}/reward": reward_state},
            cursors={**state.cursors, **self._advance(state.cursors)},
        )
        metrics = {**metrics, **host_metrics, "learning_rate": rate}
        metrics["dispatch_seconds"] = time.perf_counter() - started
        return state, {f"{self.name}/{name}": number for name, number in metrics.items()}

    def _above_base(self, name: str) -> Callable[..., Any]:
        """One of the functions, with the base as its first argument."""

        def function(base: Params, *inputs, **settings):
            return getattr(replace(self.functions, base=base), name)(*inputs, **settings)

        return function

    def _enter(self, state: RunState) -> RunState:
        """Freezes the references that are due; gives a separate value network the policy to start from."""
        schedule, policy = state.schedule, state.train.params["model"]
        cycle, entered = schedule.entries.get(self.name, 0), schedule.last != self.name
        due = {
            name: _copy(policy)
            for name, reference in self.config.references.items()
            if name not in state.references or reference.is_due(cycle, entered)
        }
        if self.config.value_network == "separate" and not schedule.steps.get(self.name, 0):
            params = state.train.params
            params = {**params, "value": {**params["value"], "model": _copy(policy)}}
            state = replace(state, train=replace(state.train, params=params))
        return replace(state, references={**state.references, **due}) if due else state

    def _reward(self, state: RunState, prompts: PromptBatch, samples: Samples, scored: Scored):
        """Scores of the responses; texts are scored on the host while the device scores the tokens."""
        reward, reward_state = self.config.reward, state.host[f"{self.name}/reward"]
        before = time.perf_counter()
        if reward.on_device:
            return (
                reward.score_tokens(scored.tokens, scored.attention_mask, scored.response_mask),
                reward_state,
                {},
            )
        tokens, mask = jax.device_get((samples.tokens, samples.response_mask))
        sampled = time.perf_counter()
        responses = decode_responses(self._tokenizer, tokens, mask, self.functions.eos_ids)
        texts = [example.prompt for example in prompts.examples]
        scores, reward_state, parts = reward.score(reward_state, texts, responses, columns_of(prompts.examples))
        metrics = {
            f"reward/{name.removesuffix('_mean')}": number
            for name, number in reward.metrics(reward_state, parts).items()
        }
        metrics |= {
            "rollout_seconds": sampled - before,
            "reward_seconds": time.perf_counter() - sampled,
            "tokens": int(mask.sum()),
        }
        return self._mesh.split(scores), reward_state, metrics

    def _example_batch(self, cursor: int) -> TokenBatch | None:
        if self._examples is None:
            return None
        return self._mesh.split(self._examples.batch(cursor, self._example_rows))

    def _advance(self, cursors: Mapping[str, int]) -> dict[str, int]:
        advanced = {self.name: cursors.get(self.name, 0) + self.config.prompts_per_step}
        if self._examples is not None:
            examples = f"{self.name}/examples"
            advanced[examples] = cursors.get(examples, 0) + self._example_rows
        return advanced

    @property
    def _example_rows(self) -> int:
        return self.config.sft_mix.batch_size * self.config.minibatches if self.config.sft_mix else 0


def prompt_stream(config: PPO, resources: Resources) -> PromptStream:
    """The prompts that the policy answers; they leave room for a whole response in the model's context."""
    if isinstance(resources.model, EncoderDecoder):
        raise UserError(f"phases.{resources.name}: PPO needs a decoder; an encoder-decoder learns by sft alone")
    examples = config.source.load("train") if config.source is not None else resources.examples
    context = resources.model.max_length
    room = None if context is None else context - config.sampler.max_new_tokens
    limits = [limit for limit in (room, config.max_prompt_length) if limit is not None]
    if limits and min(limits) < 1:
        raise UserError(
            f"{resources.name}.sampler.max_new_tokens must leave room for a prompt in the context of {context} "
            f"tokens, got {config.sampler.max_new_tokens}"
        )
    return PromptStream(
        examples, resources.tokenizer, seed=resources.seed, max_prompt_length=min(limits, default=None)
    )


def _repeat(prompts: PromptBatch, times: int) -> PromptBatch:
    """Each prompt ``times`` times, one after the other."""
    if times == 1:
        return prompts
    examples = tuple(example for example in prompts.examples for _ in range(times))
    return PromptBatch(np.repeat(prompts.tokens, times, 0), np.repeat(prompts.mask, times, 0), examples)


def _copy(tree: Params) -> Params:
    """A copy of its own: updates donate, and so delete, the buffers of the policy."""
    return jax.tree.map(jnp.copy, tree)
