"""Proximal policy optimisation of a language model.

One step: sample responses, score them with the value and reference models, reward them, turn rewards into
advantages, and take ``epochs × minibatches`` clipped updates:

    R_t = −β (log π_old(y_t) − log π_ref(y_t)) + [t last] · score        A, G = GAE(R, V)
    L   = mean max(−A ρ, −A clip(ρ, 1 ± ε))
        + c_v ½ mean max((V − G)², (clip(V, V_old ± ε_v) − G)²) − c_H mean H

The KL to the reference is the single-sample k1 in the reward and nowhere else. As a loss, k1 has zero expected
gradient, so it is no penalty at all; k3 as a loss pulls to another optimum (that of the forward KL), and k3 in
the reward can diverge. So none of them is a setting (tests/algorithms proves these statements on a bandit).

Here is the host's side of a step; its settings are in `ppo_settings`, the pure functions that it calls in
`ppo_functions`.

Sources: Schulman et al. 2017 (arXiv 1707.06347), Ziegler et al. 2019 (1909.08593), Ouyang et al. 2022
(2203.02155).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybrid_jax.core.batches import PromptBatch, Samples, TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Branch
from hybrid_jax.models.base import Params
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.mesh import fetch_rows, gather_rows, put_rows, rows_here
from hybrid_jax.parallel.rules import ROLLOUTS, Placement, shard_params, under
from hybrid_jax.phases.other_models import read_like, read_value
from hybrid_jax.phases.ppo_functions import PPOFunctions, Scored
from hybrid_jax.phases.ppo_settings import PPO
from hybrid_jax.phases.prompts import prompt_stream, repeated
from hybrid_jax.phases.rollout_ahead import RolloutAhead
from hybrid_jax.phases.sft import example_shapes, sft_stream
from hybrid_jax.rewards.base import column_names, columns_of
from hybrid_jax.rewards.part_metrics import LENGTH
from hybrid_jax.rewards.segments import response_pieces
from hybrid_jax.sampling.responses import decode_responses
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import initial_loss_scale
from hybrid_jax.training.offload import without_idle
from hybrid_jax.training.phase import Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import check_rows, key_shape, rate_shape, row_shape
from hybrid_jax.training.state import RunState


class PPOPhase:
    """Steps of PPO. Trains the groups "model" and "value"."""

    def __init__(self, config: PPO, resources: Resources):
        self.config = config
        self.waits_for_device = not config.rollout_ahead
        self.shapes_setting = f"phases.{resources.name}.prompt_buckets, the lengths that prompts are padded to"
        self.name, self.kind = resources.name, resources.kind
        self.optimizer_key = resources.optimizer_key
        self.functions = PPOFunctions(config, resources.model, resources.eos_ids, self.name, self.optimizer_key)
        self._tokenizer = resources.tokenizer
        self.references = tuple(config.references)
        self._horizon = resources.horizon
        self._offload = resources.offload
        self._placement = resources.placement
        parts = config.minibatches * config.microbatches
        check_rows(resources, "responses / (minibatches × microbatches)", config.rows // parts)
        planned, mix = resources.examples is None, config.sft_mix
        self._ahead = (
            RolloutAhead(self.name, self._placement, resources.following) if config.rollout_ahead else None
        )
        self.prompts = None if planned else prompt_stream(config, resources)
        self._columns = [] if self.prompts is None else column_names(self.prompts.examples)
        if self.prompts is not None:
            config.reward.check_columns([*self._columns, *(["opponents"] if config.opponent else [])])
        where = f"phases.{self.name}.sft_mix"
        self._examples = None if planned or mix is None else sft_stream(mix.as_sft(), resources, where)
        rollout = self._placement.with_rules(ROLLOUTS[config.rollout_weights])
        self._rate = jax.jit(config.optimizer.rate)
        self._sample = jax.jit(under(rollout, self._above_base("sample")))
        self._score = jax.jit(under(self._placement, self._above_base("score")))
        learn = under(self._placement, self._above_base("learn"))
        self._learn = jax.jit(learn, donate_argnums=1, static_argnames="groups")
        copy = under(self._placement, self._frozen)
        self._copy = jax.jit(copy, static_argnames="cast")

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        start = {n: r for n, r in self.config.references.items() if r.frozen_at == "start" and not r.path}
        groups = {"model": params["model"], "value": self.functions.init_value(params["model"])}
        transform = layer_by_layer(self.config.optimizer.transform())
        return PhaseInit(
            params={"value": groups["value"]},
            opt_state={group: transform.init(tree) for group, tree in groups.items()},
            extra={
                self.functions.kl_key: self.config.kl_control.init(),
                **initial_loss_scale(self.functions.model),
                **({} if self._ahead is None else self._ahead.init(self.config)),
            },
            host={f"{self.name}/reward": self.config.reward.init()},
            references={name: self._frozen(params["model"]) for name in start},
        )

    def stage(self, state: RunState) -> str:
        """``value alone`` while the value warms up."""
        steps = state.schedule.steps.get(self.name, 0)
        return "value alone" if steps < self.config.value_warmup_steps else ""

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        clock = _Clock()
        state = self._enter(state)
        steps, cursor = state.schedule.steps.get(self.name, 0), state.cursors.get(self.name, 0)
        sample_key, learn_key = jax.random.split(key)
        prompts, (tokens, mask) = self._prompt_batch(cursor)
        examples = self._example_batch(state.cursors.get(f"{self.name}/examples", 0))
        clock.lap("input")
        samples, following = self._answers(state, cursor, (tokens, mask), sample_key)
        scored = self._score(state.base, state.train.params, dict(state.references), tokens, mask, samples)

        opponents = self._opponents(state, (tokens, mask), key)
        received, reward_state, host_metrics = self._reward(state, prompts, samples, scored, opponents, clock)
        groups = ("value",) if self.stage(state) else ("model", "value")
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        train = state.train if self._ahead is None else self._ahead.without(state.train)
        scores = received.pop("scores")
        train, metrics = self._learn(
            state.base, train, scored, scores, examples, learn_key, rate, groups=groups, **received
        )
        # The update has been started, so that the device does not wait while the host looks at the clock.
        if self.config.reward.on_device:
            jax.block_until_ready(samples.tokens)
            clock.lap("rollout")
        else:
            clock.restart()
        cursors = self._advance(state.cursors)
        if self._ahead is not None:
            host_metrics["staleness"] = self._ahead.staleness(state)
            waiting = self._ahead.waiting(state) if following is None else following
            train = self._ahead.keep(train, waiting)
            cursors |= {} if following is None else self._ahead.cursor(cursors[self.name])
            jax.block_until_ready(waiting.tokens)
            clock.lap("rollout")
        jax.block_until_ready(scored.values)
        clock.lap("score")
        state = replace(
            state,
            train=train,
            host={**state.host, f"{self.name}/reward": reward_state},
            cursors={**state.cursors, **cursors},
        )
        metrics = {**metrics, **host_metrics, **clock.seconds, "learning_rate": rate}
        metrics["dispatch_seconds"] = time.perf_counter() - clock.started
        return state, {f"{self.name}/{name}": number for name, number in metrics.items()}

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        key = f"{self.name}/reward"
        return replace(state, host={**state.host, key: self.config.reward.observe(state.host[key], numbers)})

    def _prompt_batch(self, cursor: int) -> tuple[PromptBatch, tuple[Any, Any]]:
        """The prompts of a step, each as often as it is answered; their tokens and mask on the devices."""
        assert self.prompts is not None, "a planned phase takes no steps"
        batch = self.prompts.batch(cursor, self.config.prompts_per_step)
        prompts = repeated(batch, self.config.samples_per_prompt)
        return prompts, put_rows(self._placement, (prompts.tokens, prompts.mask))

    def _answers(
        self, state: RunState, cursor: int, prompts: tuple[Array, Array], key: Array
    ) -> tuple[Samples, Samples | None]:
        """Responses to the prompts of this step and, if they are sampled ahead, to those of the next."""
        sample = partial(self._sample, state.base, state.train.params["model"])
        if self._ahead is None:
            return sample(*prompts, key), None
        now_key, next_key = jax.random.split(key)
        samples = self._ahead.of(state)
        if samples is None:
            samples = sample(*prompts, now_key)
        if not self._ahead.is_wanted(state):
            return samples, None
        _, following = self._prompt_batch(cursor + self.config.prompts_per_step)
        return samples, self._ahead.settled(sample(*following, next_key))

    def _above_base(self, name: str) -> Callable[..., Any]:
        """One of the functions, with the base as its first argument."""

        def function(base: Params, *inputs, **settings):
            result = getattr(replace(self.functions, base=base), name)(*inputs, **settings)
            return (shard_params(result[0], param_axes), *result[1:]) if name == "learn" else result

        function.__name__ = f"{self.name}_{name}"
        return function

    def _frozen(self, trained: Params, cast: bool = True) -> Params:
        """A copy of its own, for updates donate, and so delete, the buffers of the policy.

        One that only computes is kept in the dtype of the computation: its numbers are the same.
        """
        copy = jax.tree.map(jnp.copy, self.functions.model.cast(trained) if cast else trained)
        return shard_params(copy, param_axes)

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        config, placement, rows = self.config, self._placement, self.config.rows
        length = prompt_length or max(config.prompt_buckets or (0,)) or config.max_prompt_length
        length = length or (self.prompts and self.prompts.batch(0, config.prompts_per_step).tokens.shape[1])
        if length is None:
            raise UserError(
                f"phases.{self.name}.max_prompt_length must be set to plan without data; or use --prompt-length"
            )
        responses = config.sampler.max_new_tokens
        prompts = tuple(row_shape(placement, rows, length, dtype=dtype) for dtype in ("int32", "bool"))
        key, rate = key_shape(placement), rate_shape(placement)
        policy, references = state.train.params["model"], {n: state.references[n] for n in config.references}
        samples = _like_rows(placement, jax.eval_shape(self._sample, state.base, policy, *prompts, key))
        scored = _like_rows(
            placement,
            jax.eval_shape(self._score, state.base, state.train.params, references, *prompts, samples),
        )
        scores = row_shape(placement, rows, dtype="float32")
        mix = config.sft_mix
        examples = example_shapes(placement, self._example_rows, mix.length) if mix else None
        state, idle = without_idle(state, self)
        others = {n: r for n, r in state.references.items() if n not in references}
        waiting = {"optimizer_states": idle, "references": others}
        waiting = {name: trees for name, trees in waiting.items() if name not in self._offload}
        train = state.train if self._ahead is None else self._ahead.without(state.train)
        return [
            Program(
                f"{self.name}/sample",
                self._sample,
                (state.base, policy, *prompts, key),
                loop_steps=responses - 1,
                tokens=rows * responses,
                beside=(_without(train.params, "model"), train.opt_state, train.extra, references, waiting),
            ),
            Program(
                f"{self.name}/score",
                self._score,
                (state.base, train.params, references, *prompts, samples),
                tokens=rows * (length + responses),
                beside=(train.opt_state, train.extra, waiting),
            ),
            Program(
                f"{self.name}/learn",
                self._learn,
                (state.base, train, scored, scores, examples, key, rate),
                settings={"groups": ("model", "value")},
                tokens=config.epochs * rows * (length + responses),
                learns=True,
                beside=(references, waiting),
            ),
        ]

    def _enter(self, state: RunState) -> RunState:
        """Freezes the references that are due; gives a separate value network the policy to start from."""
        schedule, policy = state.schedule, state.train.params["model"]
        cycle, entered = schedule.entries.get(self.name, 0), schedule.last != self.name
        model = self.functions.model
        due = {
            name: self._copy(
                policy if reference.path is None else read_like(reference.path, model, policy, state.base)
            )
            for name, reference in self.config.references.items()
            if name not in state.references or reference.is_due(cycle, entered)
        }
        if self.config.value_network == "separate" and not schedule.steps.get(self.name, 0):
            value = self._first_value(state, policy)
            state = replace(state, train=replace(state.train, params={**state.train.params, "value": value}))
        return replace(state, references={**state.references, **due}) if due else state

    def _opponents(self, state: RunState, prompts: tuple[Array, Array], key: Array) -> list[Samples]:
        """Answers of the opponent to the same prompts."""
        if self.config.opponent is None:
            return []
        opponent, count = state.references[self.config.opponent.reference], self.config.opponent.num_samples
        return [self._sample(state.base, opponent, *prompts, each) for each in _opponent_keys(key, count)]

    def _first_value(self, state: RunState, policy: Params) -> dict[str, Any]:
        """A separate value network before its first step: a copy of the policy, or of a reward model."""
        value, path = state.train.params["value"], self.config.value_init
        if path is None:
            return {**value, "model": self._copy(policy, cast=False)}
        read = read_value(path, self.functions.model, policy, state.base)
        places = jax.tree.map(lambda x: x.sharding, value["head"])
        return {"model": self._copy(read["model"], cast=False), "head": jax.device_put(read["head"], places)}

    def _reward(
        self,
        state: RunState,
        prompts: PromptBatch,
        samples: Samples,
        scored: Scored,
        opponents: Sequence[Samples],
        clock: _Clock,
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Scores of the responses; texts are scored on the host while the device scores the tokens."""
        reward, reward_state = self.config.reward, state.host[f"{self.name}/reward"]
        if reward.on_device:
            scores = reward.score_tokens(scored.tokens, scored.attention_mask, scored.action_mask)
            return {"scores": scores}, reward_state, {}
        tokens, mask = fetch_rows(samples.tokens), fetch_rows(samples.action_mask)
        here = [prompts.examples[row] for row in rows_here(samples.tokens)]
        others = [self._texts(other) for other in opponents]
        clock.lap("rollout")
        columns = columns_of(here, self._columns)
        if others:
            columns["opponents"] = [list(texts) for texts in zip(*others, strict=True)]
        eos_ids = self.functions.eos_ids
        pieces = response_pieces(self._tokenizer, tokens, mask, eos_ids) if reward.is_placed else None
        responses = decode_responses(self._tokenizer, tokens, mask, eos_ids)
        raw = reward.raw([example.prompt for example in here], responses, columns, pieces, mask.shape[1])
        # A few numbers a row, from every process: statistics are over the whole rollout.
        raw |= {LENGTH: mask.sum(axis=1).astype(np.float32)}
        raw = {n: gather_rows(self._placement, part, len(prompts.examples)) for n, part in raw.items()}
        asked = [example.prompt for example in prompts.examples]
        groups = np.arange(len(asked)) // self.config.samples_per_prompt
        scores, reward_state = reward.weigh(reward_state, raw, asked, groups, raw.pop(LENGTH))
        names = {name: name.removesuffix("_mean") for name in scores.metrics}
        metrics = {f"reward/{names[name]}": number for name, number in scores.metrics.items()}
        received = {
            "scores": scores.totals,
            "plain": scores.plain,
            "placed": scores.placed,
            "baseline": scores.baseline,
        }
        received = {name: array for name, array in received.items() if array is not None}
        clock.lap("reward")
        return put_rows(self._placement, received), reward_state, metrics

    def _texts(self, samples: Samples) -> list[str]:
        tokens, mask = fetch_rows(samples.tokens), fetch_rows(samples.action_mask)
        return decode_responses(self._tokenizer, tokens, mask, self.functions.eos_ids)

    def _example_batch(self, cursor: int) -> TokenBatch | None:
        if self._examples is None:
            return None
        return put_rows(self._placement, self._examples.batch(cursor, self._example_rows))

    def _advance(self, cursors: Mapping[str, int]) -> dict[str, int]:
        advanced = {self.name: cursors.get(self.name, 0) + self.config.prompts_per_step}
        if self._examples is not None:
            examples = f"{self.name}/examples"
            advanced[examples] = cursors.get(examples, 0) + self._example_rows
        return advanced

    @property
    def _example_rows(self) -> int:
        return self.config.sft_mix.batch_size * self.config.minibatches if self.config.sft_mix else 0


class _Clock:
    """What the host waited for in one step, in turn: ``<part>_seconds``."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.started = self._last = time.perf_counter()

    def restart(self) -> None:
        """Leaves the time since the last lap, of starting the update, to the update."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        name = f"{part}_seconds"
        self.seconds[name], self._last = self.seconds.get(name, 0.0) + now - self._last, now


@partial(jax.jit, static_argnums=1)
def _opponent_keys(key: Array, count: int) -> list[Array]:
    """Noise that the policy's own answers do not share."""
    return list(jax.random.split(jax.random.fold_in(key, Branch.OPPONENTS), count))


def _like_rows(placement: Placement, shapes: Any) -> Any:
    """Shapes of a rollout with their rows split like those of a batch."""
    return jax.tree.map(lambda x: row_shape(placement, *x.shape, dtype=x.dtype), shapes)


def _without(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: part for other, part in tree.items() if other != name}
