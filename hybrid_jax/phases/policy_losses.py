"""The loss of a policy gradient on some rows of a rollout: policy, value, entropy and mixed examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.kl import KL_LOSSES, kl_losses
from hybrid_jax.algorithms.policy_gradient import clipped_value_loss, policy_change, token_losses
from hybrid_jax.core.arrays import Sum, masked_sum
from hybrid_jax.core.batches import Rollout, TokenBatch
from hybrid_jax.models.base import Params
from hybrid_jax.models.heads import value
from hybrid_jax.models.scoring import shift_states, states_before, target_log_probs
from hybrid_jax.phases.rollout_functions import RolloutFunctions
from hybrid_jax.phases.sft import num_targets, sft_losses
from hybrid_jax.phases.value_network import init_value
from hybrid_jax.training.update import Objective


@dataclass(frozen=True)
class PolicyLosses(RolloutFunctions):
    """The pure functions of a rollout, with its values, and of the losses that learn from it."""

    @property
    def value_key(self) -> str:
        """The group of ``TrainState.params`` that is the phase's own value."""
        return f"{self.name}/value"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of parameters that the updates train."""
        return ("model",) if self.config.value is None else ("model", self.value_key)

    def init_value(self, policy: Params) -> dict[str, Params]:
        """The group of the value, if the method has one."""
        if self.config.value is None:
            return {}
        return {self.value_key: init_value(self.model, policy, separate=self.config.value == "separate")}

    def objective(self, frozen: Mapping[str, Params], kl_coef: Array | float = 0.0) -> Objective:
        """The loss of the groups that are not ``frozen``; ``kl_coef`` is β of a KL in the loss."""
        coefs = self._coefs("model" in frozen, kl_coef)

        # Frozen groups enter beside the gradient's arguments, so that no gradient of them is ever made.
        def loss(trained, batch, key):
            return self.losses({**frozen, **trained}, *batch)

        def weights(batch) -> dict[str, Any]:
            rollout, examples = batch
            # Of the whole batch, not of a microbatch: a mean of means would weigh short responses more.
            weights = dict.fromkeys(coefs, rollout.loss_shares.sum())
            weights["value_loss"] = _counted(rollout).sum()
            weights |= dict.fromkeys(self.model.loss_coefs, rollout.attention_mask.sum())
            return weights if examples is None else {**weights, "sft_loss": num_targets(examples)}

        return Objective(loss, weights, coefs)

    def _coefs(self, value_only: bool, kl_coef: Array | float) -> dict[str, Any]:
        config = self.config
        coefs: dict[str, Any] = {"policy_loss": 1.0}
        if config.kl_penalty in KL_LOSSES and config.references:
            coefs["kl_loss"] = kl_coef
        if config.value is not None:
            coefs["value_loss"] = config.value_coef
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
        length, policy = mask.shape[1], self.whole(params["model"])
        hidden, model_losses = model.hidden_and_losses(policy, rollout.tokens, rollout.attention_mask)
        states = shift_states(hidden, length)
        log_probs, entropies = target_log_probs(
            model,
            policy,
            states,
            rollout.tokens[:, -length:],
            temperature=config.sampler.policy_temperature,  # of the distribution that sampled
            with_entropy=bool(config.entropy_coef),
        )
        losses, metrics = token_losses(
            config.objective, log_probs, rollout.log_probs, rollout.advantages, mask, config.ratio
        )
        metrics |= policy_change(log_probs, rollout.log_probs, mask)
        terms = {"policy_loss": _weighted(losses, rollout), **model_losses}
        if rollout.reference_log_probs and config.kl_penalty in KL_LOSSES:
            losses = kl_losses(
                KL_LOSSES[config.kl_penalty],
                log_probs,
                rollout.log_probs,
                rollout.reference_log_probs,
                {name: reference.weight for name, reference in config.references.items()},
                mask,
            )
            terms["kl_loss"] = _weighted(losses, rollout)
        if config.value is not None:
            group = params[self.value_key]
            if config.value == "separate":
                trunk = self.whole(group["model"])
                states = states_before(model, trunk, rollout.tokens, rollout.attention_mask, length)
            terms["value_loss"], value_metrics = clipped_value_loss(
                value(group["head"], states),
                rollout.values,
                rollout.returns,
                _counted(rollout),
                clip_range=config.value_clip_range,
            )
            metrics |= value_metrics
        if entropies is not None:
            terms["exact_entropy"] = _weighted(entropies, rollout)
        if examples is not None:
            terms["sft_loss"] = sft_losses(model, policy, examples)["loss"]
        return terms, metrics

    def values(
        self,
        params: dict[str, Params],
        tokens: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        length: int,
    ) -> Any:
        """`RolloutFunctions.values`."""
        if self.config.value is None:
            return None
        group = params[self.value_key]
        trunk = self.whole(group.get("model", params["model"]))
        return value(group["head"], self.model.hidden(trunk, tokens, attention_mask)[:, -length - 1 :])


def _counted(rollout: Rollout) -> Bool[Array, "B R"]:
    """The tokens of responses that have a share in the loss: one that is left out has no returns to learn."""
    return rollout.action_mask & (rollout.loss_shares > 0)[:, None]


def _weighted(losses: Float[Array, "B R"], rollout: Rollout) -> Sum:
    """The losses of the tokens added up as the aggregation says."""
    total = masked_sum(rollout.loss_weights * losses, rollout.action_mask)
    return Sum(total=total, weight=jnp.sum(rollout.loss_shares))
