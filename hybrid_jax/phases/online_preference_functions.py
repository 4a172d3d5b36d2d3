"""The pure functions of preferences online: pairs of a rollout, and updates on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hybrid_jax.algorithms.kl import k1
from hybrid_jax.algorithms.sppo import win_rates
from hybrid_jax.core.batches import Rollout, TokenBatch
from hybrid_jax.parallel.rules import shard_rows
from hybrid_jax.phases.answer_losses import AnswerBatch, answer_log_probs, preference_terms, preference_weights
from hybrid_jax.phases.minibatches import update_in_minibatches
from hybrid_jax.phases.references import shares_of
from hybrid_jax.phases.rollout_functions import RolloutFunctions
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Groups, Objective


@dataclass(frozen=True)
class OnlinePreferenceFunctions(RolloutFunctions):
    """The pure functions of a step, for one model and one setting."""

    optimizer_key: str

    def learn(
        self, state: TrainState, rollout: Rollout, rivals: tuple[Rollout, ...], key: Array, rate: Array | float
    ) -> tuple[TrainState, dict[str, Any]]:
        """All updates of one step, on the pairs of a rewarded rollout."""
        answers, compared = self.compared(rollout, rivals)
        prompt_length = rollout.tokens.shape[1] - rollout.action_mask.shape[1]
        state, updated, _ = update_in_minibatches(
            self.config,
            self.objective(prompt_length),
            state,
            answers,
            None,
            key,
            rate,
            groups=("model",),
            optimizer_key=self.optimizer_key,
            model=self.model,
        )
        sampled = (rollout, *(rivals if self.config.pairs == "opponent" else ()))
        tokens = sum(each.action_mask.sum() for each in sampled)
        work = {"tokens": tokens, **self.config.flops(self.model, prompt_length, tokens)}
        return state, {**self.score_metrics(rollout), **self._kl(rollout), **compared, **updated, **work}

    def objective(self, prompt_length: int) -> Objective:
        """The loss of the group "model" on some groups of answers."""
        config, model = self.config, self.model
        sft_coef = config.loss.sft_coef if config.sft_coef is None else config.sft_coef

        def loss(params: Groups, batch: tuple[AnswerBatch, None], key: Array):
            answers, _ = batch
            policy, losses = answer_log_probs(
                model,
                self.whole(params["model"]),
                answers.rows,
                temperature=config.sampler.policy_temperature,
                prompt_length=prompt_length,
            )
            terms, metrics = preference_terms(config.loss, sft_coef, policy, answers.reference, answers)
            return {**terms, **losses}, metrics

        def weights(batch: tuple[AnswerBatch, None]) -> dict[str, Array]:
            return preference_weights(config.loss, model, batch[0])

        return Objective(loss, weights, {"loss": 1.0, "sft": sft_coef, **model.loss_coefs})

    def compared(self, rollout: Rollout, rivals: tuple[Rollout, ...]) -> tuple[AnswerBatch, dict[str, Array]]:
        """The pairs or groups of a rewarded rollout, the best answer first, and what is to log of them."""
        if self.config.pairs == "example":
            return shard_rows(_beside(self._answers(rivals[0]), self._answers(rollout))), {}
        metrics, own = {}, (self._answers(rollout), rollout.scores)
        if self.config.pairs == "opponent":
            pairs = [_beside(own, (self._answers(rival), rival.scores)) for rival in rivals]
            # The pairs of one answer stay side by side, on its device.
            answers, scores = jax.tree.map(_interleaved, *pairs)
            metrics["opponent_score"] = jnp.mean(jnp.stack([rival.plain_scores for rival in rivals]))
            metrics["win_rate"] = 0.5 + 0.5 * jnp.sign(scores[:, 0] - scores[:, 1]).mean()
        else:
            shape = self.config.prompts_per_step, self.config.samples_per_prompt
            answers, scores = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), own)
        answers, scores = _ranked(answers, scores)
        differ = scores[:, 0] > scores[:, -1]
        metrics["ties"] = 1.0 - differ.mean()
        if self.config.pairs == "group":
            return shard_rows(replace(answers, wins=win_rates(scores))), metrics
        ends = jax.tree.map(lambda x: x[:, jnp.array([0, -1])], answers)
        return shard_rows(replace(ends, counts=differ)), metrics

    def _answers(self, rollout: Rollout) -> AnswerBatch:
        """The rows of a rollout, [B ...], with what the references say of them."""
        mask = rollout.action_mask
        prompts = jnp.zeros((len(mask), rollout.tokens.shape[1] - mask.shape[1]), bool)
        rows = TokenBatch(
            tokens=rollout.tokens,
            segment_ids=rollout.attention_mask.astype(jnp.int32),
            loss_mask=jnp.concatenate([prompts, mask], axis=1),
        )
        reference = None
        if self.config.loss.needs_reference:
            shares = shares_of(self.config.references)
            sums = {
                name: jnp.where(mask, rollout.reference_log_probs[name], 0.0).sum(axis=1) for name in shares
            }
            reference = sum((shares[name] * sums[name] for name in shares), jnp.zeros(len(mask)))
        return AnswerBatch(rows, reference)

    def _kl(self, rollout: Rollout) -> dict[str, Array]:
        """KL(π ‖ π_ref) an answer, in nats, weighted over the references; of the policy that sampled."""
        references = self.config.references
        if not sum(reference.weight for reference in references.values()) > 0:
            return {}
        mask = rollout.action_mask
        apart = [
            share * jnp.where(mask, k1(rollout.log_probs, rollout.reference_log_probs[name]), 0.0).sum(1).mean()
            for name, share in shares_of(references).items()
        ]
        return {"kl": sum(apart[1:], apart[0])}


def _beside(first: Any, second: Any) -> Any:
    """Two trees of rows [B ...] as one of pairs [B 2 ...]."""
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1), first, second)


def _interleaved(*pairs: Array) -> Array:
    """Several pairs of each row, [B 2 ...] each, one behind the other: [B·len(pairs) 2 ...]."""
    stacked = jnp.stack(pairs, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def _ranked(answers: AnswerBatch, scores: Array) -> tuple[AnswerBatch, Array]:
    """Groups of answers [G K ...] with the best by score first, and the scores [G K] in this order."""
    order = jnp.argsort(-scores, axis=1)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, (answers, scores))
