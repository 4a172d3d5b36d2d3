"""The pure functions of one PPO step: sample, score, advantages, update; and all of them as one.

With a reward on the device, `PPOFunctions.iteration` is a whole step as one function of the state, which
`jax.jit`, `jax.vmap` and `jax.lax.scan` take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from hybrid_jax.algorithms.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
)
from hybrid_jax.algorithms.returns import gae, k1, k3, token_rewards, whiten
from hybrid_jax.core.arrays import Sum, masked_mean
from hybrid_jax.core.batches import Rollout, Samples, TokenBatch
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.heads import init_value_head, value
from hybrid_jax.models.lora import whole
from hybrid_jax.models.scoring import response_log_probs, shift_states, states_before, target_log_probs
from hybrid_jax.parallel.rules import shard_rows
from hybrid_jax.phases.sft import num_targets, sft_losses
from hybrid_jax.phases.work import ppo_flops
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.responses import ended, join
from hybrid_jax.training import nonfinite
from hybrid_jax.training.loss_scale import loss_scale_of
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective, update_state

if TYPE_CHECKING:
    from hybrid_jax.phases.ppo_settings import PPO


@struct.dataclass
class Scored:
    """A rollout before its reward is known."""

    tokens: Int[Array, "B T"]
    attention_mask: Bool[Array, "B T"]
    action_mask: Bool[Array, "B R"]
    log_probs: Float[Array, "B R"]
    values: Float[Array, "B R"]
    reference_log_probs: dict[str, Float[Array, "B R"]]


@dataclass(frozen=True)
class PPOFunctions:
    """The pure functions of PPO for one model and one setting.

    Policy, references and the trunk of a value network are given as what trains of them; ``base`` are the
    parameters that they share, below adapters.
    """

    config: PPO
    model: LanguageModel
    eos_ids: tuple[int, ...]
    name: str  # of the phase
    optimizer_key: str
    base: Params = field(default_factory=dict)

    def _whole(self, trained: Params) -> Params:
        return whole(self.base, trained)

    @property
    def kl_key(self) -> str:
        """Where ``TrainState.extra`` keeps the state of the KL control."""
        return f"{self.name}/kl_control"

    def init_value(self, policy: Params) -> dict[str, Any]:
        """A value head of zeros; a separate network also gets a trunk, a copy of the policy's."""
        head = {"head": init_value_head(self.model.width)}
        return (
            {"model": jax.tree.map(jnp.copy, policy), **head}
            if self.config.value_network == "separate"
            else head
        )

    def sample(self, policy: Params, prompt_tokens: Array, prompt_mask: Array, key: Array) -> Samples:
        policy = self._whole(policy)
        inputs = (self.model, policy, prompt_tokens, prompt_mask, key)
        return sample(self.config.sampler, *inputs, eos_ids=self.eos_ids)

    def score(
        self,
        params: dict[str, Params],
        references: Mapping[str, Params],
        prompt_tokens: Array,
        prompt_mask: Array,
        samples: Samples,
    ) -> Scored:
        """Values of the states and the references' log-probabilities of the tokens."""
        prompt_tokens, prompt_mask, samples = shard_rows((prompt_tokens, prompt_mask, samples))
        assert samples.log_probs is not None, "the sampler has a policy_temperature"
        tokens, attention_mask = join(prompt_tokens, prompt_mask, samples)
        length, temperature = samples.tokens.shape[1], self.config.sampler.policy_temperature
        trunk = self._whole(params["value"].get("model", params["model"]))
        states = states_before(self.model, trunk, tokens, attention_mask, length)
        reference_log_probs = {
            name: response_log_probs(
                self.model, self._whole(references[name]), tokens, attention_mask, length, temperature
            )
            for name in self.config.references
        }
        return Scored(
            tokens=tokens,
            attention_mask=attention_mask,
            action_mask=samples.action_mask,
            log_probs=samples.log_probs,
            values=value(params["value"]["head"], states),
            reference_log_probs=reference_log_probs,
        )

    def learn(
        self,
        state: TrainState,
        scored: Scored,
        scores: Float[Array, "B"],
        examples: TokenBatch | None,
        key: Array,
        rate: Array | float,
        *,
        groups: tuple[str, ...] = ("model", "value"),
        plain: Float[Array, "B"] | None = None,
        placed: Float[Array, "B R"] | None = None,
        baseline: Float[Array, "B"] | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """All updates of one step, and the new KL coefficient.

        ``placed`` is what of the ``scores`` is received with earlier tokens than the last; a ``baseline`` is
        taken from them. ``plain`` is what they were before any normaliser, to log; None if there is none.
        """
        control, control_state = self.config.kl_control, state.extra[self.kl_key]
        coef = control.coefficient(control_state)
        scores, score_metrics = self._shaped_scores(scores, plain, baseline, scored)
        rollout, rollout_metrics = self.advantages(scored, scores, coef, placed)
        state, update_metrics = self.update(state, rollout, examples, key, rate, groups)
        if "model" in groups:  # a policy at rest says nothing about the strength of its leash
            control_state = control.update(control_state, rollout_metrics["kl"], scores.shape[0])
        state = replace(state, extra={**state.extra, self.kl_key: control_state})
        metrics = {**score_metrics, **rollout_metrics, **update_metrics, "kl_coef": coef}
        return state, {**metrics, **self._work(scored, groups)}

    def _work(self, scored: Scored, groups: tuple[str, ...]) -> dict[str, Any]:
        """Tokens sampled and arithmetic needed in one step."""
        rows, length = scored.action_mask.shape
        tokens = scored.action_mask.sum()
        prompt_length = scored.tokens.shape[1] - length
        work = ppo_flops(self.config, self.model, rows, prompt_length, length, tokens, groups)
        return {"tokens": tokens, **work}

    def _shaped_scores(
        self, scores: Array, plain: Array | None, baseline: Array | None, scored: Scored
    ) -> tuple[Array, dict[str, Array]]:
        """Subtracts penalty and baseline from the scores, and logs each under a name of its own."""
        length = scored.action_mask.shape[1]
        complete = ended(scored.tokens[:, -length:], scored.action_mask, self.eos_ids)
        penalty = (self.config.missing_eos_penalty or 0.0) * ~complete
        plain = scores if plain is None else plain
        shaped = scores - penalty - (0.0 if baseline is None else baseline)
        return shaped, {
            "score": plain.mean(),
            "score_std": plain.std(),
            "shaped_score": shaped.mean(),
            "penalty": penalty.mean(),
            **({} if baseline is None else {"baseline": baseline.mean()}),
            "eos_fraction": complete.mean(),
            "response_length": scored.action_mask.sum(axis=1).mean(),
        }

    def advantages(
        self,
        scored: Scored,
        scores: Float[Array, "B"],
        kl_coef: Array,
        placed: Float[Array, "B R"] | None = None,
    ) -> tuple[Rollout, dict[str, Array]]:
        """Rewards, advantages and returns of a scored rollout. ``kl`` sums over a response, in nats."""
        config, mask = self.config, scored.action_mask
        weights = {name: reference.weight for name, reference in config.references.items()}
        last = scores if placed is None else scores - jnp.where(mask, placed, 0).sum(axis=1)
        rewards = token_rewards(last, scored.log_probs, scored.reference_log_probs, weights, kl_coef, mask)
        rewards = rewards if placed is None else rewards + jnp.where(mask, placed, 0)
        advantages, returns = gae(rewards, scored.values, mask, discount=config.discount, trace=config.trace)
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)
        kl, kl_k3 = (
            sum(
                (
                    weights[name] * jnp.where(mask, estimate(scored.log_probs, reference), 0).sum(1).mean()
                    for name, reference in scored.reference_log_probs.items()
                ),
                jnp.zeros(()),
            )
            for estimate in (k1, k3)
        )
        rollout = Rollout(
            tokens=scored.tokens,
            attention_mask=scored.attention_mask,
            action_mask=mask,
            log_probs=scored.log_probs,
            values=scored.values,
            advantages=advantages,
            returns=returns,
        )
        return rollout, {
            "kl": kl,
            "kl_k3": kl_k3,
            "entropy": masked_mean(-scored.log_probs, mask),
            "value": masked_mean(scored.values, mask),
            "explained_variance": explained_variance(scored.values, returns, mask),
        }

    def update(
        self,
        state: TrainState,
        rollout: Rollout,
        examples: TokenBatch | None,
        key: Array,
        rate: Array | float,
        groups: tuple[str, ...],
    ) -> tuple[TrainState, dict[str, Array]]:
        """``epochs × minibatches`` optimizer steps; metrics are means over those that were taken."""
        config, minibatches = self.config, self.config.minibatches
        objective = self.objective({g: tree for g, tree in state.params.items() if g not in groups})
        order_key, loss_key = jax.random.split(key)
        rows = _epoch_orders(order_key, rollout.tokens.shape[0], config.epochs)
        rows = rows.reshape(config.epochs * minibatches, -1)
        parts = jnp.tile(jnp.arange(minibatches), config.epochs)

        def minibatch(carry, inputs):
            state, stopped = carry
            rows, part, key = inputs
            batch = shard_rows((jax.tree.map(lambda x: x[rows], rollout), _part(examples, part, minibatches)))
            state, metrics, taken = update_state(
                objective,
                config.optimizer,
                state,
                batch,
                key,
                rate,
                optimizer_key=self.optimizer_key,
                groups=groups,
                microbatches=config.microbatches,
                scaling=loss_scale_of(self.model),
                accept=lambda metrics: ~(stopped | self._too_far(metrics)),
            )
            return (state, stopped | self._too_far(metrics)), (metrics, taken)

        own = replace(state, opt_state={self.optimizer_key: state.opt_state[self.optimizer_key]})
        inputs = (rows, parts, jax.random.split(loss_key, len(parts)))
        (own, _), (metrics, taken) = jax.lax.scan(minibatch, (own, jnp.asarray(False)), inputs)
        state = replace(own, opt_state={**state.opt_state, **own.opt_state})
        first_ratio = metrics["ratio"][0]  # 1 unless sampled by an older policy, or they disagree
        bad = metrics.pop(nonfinite.METRIC)
        counted = taken | (bad != nonfinite.FINE)
        means = {name: Sum.of(values, counted).mean() for name, values in metrics.items()}
        means |= {nonfinite.METRIC: bad[jnp.argmax(bad != nonfinite.FINE)], "updates": taken.sum()}
        return state, {**means, "first_ratio": first_ratio}

    def _too_far(self, metrics: Mapping[str, Array]) -> Array:
        """Whether the policy has moved as far as one step may."""
        target = self.config.target_kl
        return jnp.asarray(False) if target is None else metrics["approx_kl"] > target

    def objective(self, frozen: Mapping[str, Params]) -> Objective:
        """The loss of the groups that are not ``frozen``."""
        coefs = self._coefs(value_only="model" in frozen)

        def loss(trained, batch, key):
            return self.losses({**frozen, **trained}, *batch)

        def weights(batch) -> dict[str, Any]:
            rollout, examples = batch
            weights = dict.fromkeys(coefs, rollout.action_mask.sum())
            weights |= dict.fromkeys(self.model.loss_coefs, rollout.attention_mask.sum())
            return weights if examples is None else {**weights, "sft_loss": num_targets(examples)}

        return Objective(loss, weights, coefs)

    def _coefs(self, value_only: bool) -> dict[str, float]:
        config = self.config
        coefs = {"policy_loss": 1.0, "value_loss": config.value_coef}
        if config.entropy_coef:
            coefs["exact_entropy"] = -config.entropy_coef
        if config.sft_mix:
            coefs["sft_loss"] = config.sft_mix.coef
        coefs |= self.model.loss_coefs
        return {n: c if n == "value_loss" else 0.0 for n, c in coefs.items()} if value_only else coefs

    def losses(
        self, params: dict[str, Params], rollout: Rollout, examples: TokenBatch | None
    ) -> tuple[dict[str, Sum], dict[str, Sum]]:
        """The terms of the loss on some rows of a rollout (and of examples), as Sums."""
        config, model, mask = self.config, self.model, rollout.action_mask
        length, policy = mask.shape[1], self._whole(params["model"])
        hidden, model_losses = model.hidden_and_losses(policy, rollout.tokens, rollout.attention_mask)
        states = shift_states(hidden, length)
        log_probs, entropies = target_log_probs(
            model,
            policy,
            states,
            rollout.tokens[:, -length:],
            temperature=config.sampler.policy_temperature,
            with_entropy=bool(config.entropy_coef),
        )
        if "model" in params["value"]:
            trunk = self._whole(params["value"]["model"])
            states = states_before(model, trunk, rollout.tokens, rollout.attention_mask, length)
        values = value(params["value"]["head"], states)
        policy_loss, policy_metrics = clipped_policy_loss(
            log_probs, rollout.log_probs, rollout.advantages, mask, clip_range=config.clip_range
        )
        value_loss, value_metrics = clipped_value_loss(
            values, rollout.values, rollout.returns, mask, clip_range=config.value_clip_range
        )
        terms = {"policy_loss": policy_loss, "value_loss": value_loss, **model_losses}
        if entropies is not None:
            terms["exact_entropy"] = Sum.of(entropies, mask)
        if examples is not None:
            terms["sft_loss"] = sft_losses(model, policy, examples)["loss"]
        return terms, {**policy_metrics, **value_metrics}

    def iteration(
        self,
        state: TrainState,
        references: Mapping[str, Params],
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        rate: Array | float,
    ) -> tuple[TrainState, dict[str, Array]]:
        """A whole PPO step as one pure function, for a reward on the device."""
        sample_key, learn_key = jax.random.split(key)
        samples = self.sample(state.params["model"], prompt_tokens, prompt_mask, sample_key)
        scored = self.score(state.params, references, prompt_tokens, prompt_mask, samples)
        scores = self.config.reward.score_tokens(scored.tokens, scored.attention_mask, scored.action_mask)
        return self.learn(state, scored, scores, None, learn_key, rate)


def _epoch_orders(key: Array, rows: int, epochs: int) -> Int[Array, "epochs B"]:
    """A fresh order of the rows for every epoch."""
    return jax.vmap(lambda key: jax.random.permutation(key, rows))(jax.random.split(key, epochs))


def _part(tree: Any, index: Array, parts: int) -> Any:
    """The ``index``-th of equal parts of the rows."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:])[index], tree)
