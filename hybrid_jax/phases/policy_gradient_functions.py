"""The pure functions of a policy gradient: advantages, weights of tokens, updates; see `policy_gradient`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from hybrid_jax.algorithms.advantages import reads_ratios, whiten
from hybrid_jax.algorithms.aggregation import loss_weights
from hybrid_jax.algorithms.kl import k1, k3, token_rewards
from hybrid_jax.algorithms.policy_gradient import explained_variance
from hybrid_jax.core.arrays import masked_mean
from hybrid_jax.core.batches import Rollout, TokenBatch
from hybrid_jax.models.base import Params
from hybrid_jax.models.scoring import response_log_probs
from hybrid_jax.phases.minibatches import update_in_minibatches, whole_rollout
from hybrid_jax.phases.policy_losses import PolicyLosses
from hybrid_jax.phases.rollout_functions import whole_rows
from hybrid_jax.sampling.base import explores
from hybrid_jax.training import loss_scale
from hybrid_jax.training.loss_scale import loss_scale_of
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Groups, gradients, update


@dataclass(frozen=True)
class PolicyGradientFunctions(PolicyLosses):
    """The pure functions of a step, for one model and one setting."""

    optimizer_key: str

    @property
    def kl_key(self) -> str:
        """The key of the state of the KL control in ``TrainState.extra``."""
        return f"{self.name}/kl_control"

    def iteration(
        self,
        state: TrainState,
        references: Mapping[str, Params],
        prompt_tokens: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: Array,
        rate: Array | float,
    ) -> tuple[TrainState, dict[str, Array]]:
        """A whole step as one pure function, for a reward on the device."""
        sample_key, learn_key = jax.random.split(key)
        samples = self.sample(state.params["model"], prompt_tokens, prompt_mask, sample_key)
        rollout = self.score(state.params, references, prompt_tokens, prompt_mask, samples)
        return self.learn(state, self.rewarded(rollout), None, learn_key, rate)

    def learn(
        self,
        state: TrainState,
        rollout: Rollout,
        examples: TokenBatch | None,
        key: Array,
        rate: Array | float,
        *,
        groups: tuple[str, ...] | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """Learns from a rewarded rollout: advantages, all updates of one step, and the new KL coefficient."""
        groups = groups or self.groups
        coef = self.config.kl_control.coefficient(state.extra[self.kl_key])
        rollout, metrics = self.prepared(state.params["model"], rollout, coef, groups)
        state, updated = self.update(state, rollout, examples, key, rate, groups, coef)
        return self._controlled(state, metrics["kl"], groups), {**metrics, **updated, "kl_coef": coef}

    def gradient(
        self, state: TrainState, rollout: Rollout, key: Array, *, groups: tuple[str, ...]
    ) -> tuple[Groups, dict[str, Array]]:
        """The gradient of the whole of a rewarded rollout: the first half of `learn` with one update."""
        coef = self.config.kl_control.coefficient(state.extra[self.kl_key])
        rollout, metrics = self.prepared(state.params["model"], rollout, coef, groups)
        frozen = {group: tree for group, tree in state.params.items() if group not in groups}
        batch, loss_key = whole_rollout(self._learned(rollout), key)
        grads, measured = gradients(
            self.objective(frozen, coef),
            {group: state.params[group] for group in groups},
            (batch, None),
            loss_key,
            self.config.microbatches,
            state.extra[loss_scale.STATE].scale if loss_scale_of(self.model) else None,
        )
        return grads, {**metrics, **measured, "first_ratio": measured["ratio"], "kl_coef": coef}

    def apply(
        self, state: TrainState, grads: Groups, metrics: Mapping[str, Array], rate: Array | float
    ) -> tuple[TrainState, dict[str, Array]]:
        """One update by a `gradient`, wherever that was computed: the second half of `learn`."""
        coefs = self._coefs("model" not in grads, 0.0)
        state, metrics, taken = update(
            self.config.optimizer,
            state,
            grads,
            metrics,
            rate,
            optimizer_key=self.optimizer_key,
            losses=[name for name in coefs if name in metrics],
            scaling=loss_scale_of(self.model),
        )
        return self._controlled(state, metrics["kl"], tuple(grads)), {**metrics, "updates": taken.astype(int)}

    def prepared(
        self, policy: Params, rollout: Rollout, kl_coef: Array, groups: tuple[str, ...]
    ) -> tuple[Rollout, dict[str, Any]]:
        """A rewarded rollout with all that losses read, for an update of ``policy``; and what is to log."""
        metrics = self.score_metrics(rollout)
        log_probs = self.current_log_probs(policy, rollout)
        rollout, estimated = self.advantages(rollout, kl_coef, log_probs)
        rollout, corrected = self.corrected(rollout, log_probs)
        return rollout, {**metrics, **estimated, **corrected, **self._work(rollout, groups)}

    def _controlled(self, state: TrainState, kl: Array, groups: tuple[str, ...]) -> TrainState:
        """The state once the KL control has heard of the KL of a rollout."""
        # While the value warms up alone the policy does not move, so its KL says nothing about β.
        if "model" not in groups:
            return state
        control = self.config.kl_control.update(state.extra[self.kl_key], kl, self.config.rows)
        return replace(state, extra={**state.extra, self.kl_key: control})

    def advantages(
        self, rollout: Rollout, kl_coef: Array, log_probs: Array | None = None
    ) -> tuple[Rollout, dict[str, Array]]:
        """Adds advantages, returns and weights to a rewarded rollout; ``kl`` sums over a response, in nats.

        ``log_probs`` are those of `current_log_probs`.
        """
        config, mask, scores = self.config, rollout.action_mask, rollout.scores
        references = rollout.reference_log_probs
        weights = {name: reference.weight for name, reference in config.references.items()}
        placed = None if rollout.placed is None else jnp.where(mask, rollout.placed, 0)
        # What segments of a response have earned already is not received again with its last token.
        last = scores if placed is None else scores - placed.sum(axis=1)
        if rollout.truncated is not None and rollout.last_values is not None:
            # A conversation that was broken off goes on in the value of its last state.
            discount = getattr(config.advantage, "discount", 1.0)
            last = last + jnp.where(rollout.truncated, discount * rollout.last_values, 0.0)
        in_reward = kl_coef if config.kl_penalty == "reward" else jnp.zeros(())
        # Weighed by ratios, it must be the policy's own KL; at first that is the KL of who sampled.
        own = rollout.log_probs if log_probs is None else log_probs
        rewards = token_rewards(last, own, references, weights, in_reward, mask)
        rewards = rewards if placed is None else rewards + placed
        learned = mask if rollout.counts is None else mask & rollout.counts[:, None]
        inputs = (rewards, rollout.values, learned, rollout.group)
        if reads_ratios(config.advantage) and log_probs is not None:
            inputs = (*inputs, jnp.where(mask, log_probs - rollout.log_probs, 0.0))
        advantages, returns = config.advantage(*inputs)
        if config.whiten_advantages:
            # Over the whole rollout: minibatches of an epoch then share one scale.
            advantages = whiten(advantages, learned)
        rows = whole_rows(rollout)
        read = mask if rows is None else learned
        sampled, ratios = rollout.log_probs, jnp.ones(())
        if explores(config.sampler):  # the KL and the entropy of the policy, not of what leads it astray
            sampled, ratios = own, jnp.exp(jnp.where(mask, own - rollout.log_probs, 0.0))
        kl, kl_k3 = (
            sum(
                (
                    weights[name]
                    * jnp.where(mask, ratios * estimate(sampled, reference), 0).sum(1).mean(where=rows)
                    for name, reference in references.items()
                ),
                jnp.zeros(()),
            )
            for estimate in (k1, k3)
        )
        metrics = {"kl": kl, "kl_k3": kl_k3, "entropy": masked_mean(-ratios * sampled, read)}
        if rollout.values is not None:
            variance = explained_variance(rollout.values, returns, learned)
            metrics |= {"value": masked_mean(rollout.values, read), "explained_variance": variance}
        weights, shares = loss_weights(config.aggregation, learned, rollout.group)
        estimated = {"advantages": advantages, "returns": returns}
        return replace(rollout, **estimated, loss_weights=weights, loss_shares=shares), metrics

    def current_log_probs(self, policy: Params, rollout: Rollout) -> Array | None:
        """The log-probs of ``policy``, [B R], where a setting compares it with the policy that sampled."""
        if self.config.correction is None and not reads_ratios(self.config.advantage):
            return None
        return response_log_probs(
            self.model,
            self.whole(policy),
            rollout.tokens,
            rollout.attention_mask,
            rollout.action_mask.shape[1],
            self.config.sampler.policy_temperature,
        )

    def corrected(self, rollout: Rollout, log_probs: Array | None) -> tuple[Rollout, dict[str, Array]]:
        """Weighs tokens that another policy sampled; ratios then start from ``log_probs``.

        So they do, too, where advantages hold the ratios already: else a loss would weigh by them twice.
        """
        mask, correction = rollout.action_mask, self.config.correction
        if log_probs is None:
            return rollout, {}
        if correction is None:
            return replace(rollout, log_probs=log_probs), {}
        factors = correction(log_probs, rollout.log_probs, mask)
        rollout = replace(rollout, log_probs=log_probs, loss_weights=rollout.loss_weights * factors)
        return rollout, {"correction": masked_mean(factors, mask)}

    def update(
        self,
        state: TrainState,
        rollout: Rollout,
        examples: TokenBatch | None,
        key: Array,
        rate: Array | float,
        groups: tuple[str, ...],
        kl_coef: Array | float = 0.0,
    ) -> tuple[TrainState, dict[str, Array]]:
        """``epochs × minibatches`` optimizer steps; metrics are means over those that were taken.

        ``kl_coef`` is β of a KL in the loss.
        """
        frozen = {group: tree for group, tree in state.params.items() if group not in groups}
        state, means, first = update_in_minibatches(
            self.config,
            self.objective(frozen, kl_coef),
            state,
            self._learned(rollout),
            examples,
            key,
            rate,
            groups=groups,
            optimizer_key=self.optimizer_key,
            model=self.model,
            target_kl=self.config.target_kl,
        )
        # 1 unless sampled by an older policy, or they disagree
        return state, {**means, "first_ratio": first["ratio"]}

    def _learned(self, rollout: Rollout) -> Rollout:
        """The fields of a rollout that losses read: rows are drawn anew for every minibatch."""
        references = rollout.reference_log_probs if self.config.kl_penalty != "reward" else {}
        unread = dict.fromkeys(("scores", "plain_scores", "placed", "counts", "truncated", "last_values"))
        return replace(rollout, reference_log_probs=references, **unread)

    def _work(self, rollout: Rollout, groups: tuple[str, ...]) -> dict[str, Any]:
        """Tokens sampled and arithmetic needed in one step."""
        tokens, trains_policy = rollout.action_mask.sum(), "model" in groups
        prompt_length = rollout.tokens.shape[1] - rollout.action_mask.shape[1]
        return {"tokens": tokens, **self.config.flops(self.model, prompt_length, tokens, trains_policy)}
