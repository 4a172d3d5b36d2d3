"""The policy imitates its own best answers: it answers, the answers are weighed, it learns them as examples.

    prompts ─ rollout ─▶ answers with scores ─ w ─▶ L = −Σ_i w_i Σ_t log π(y_i,t | x_i, y_i,<t) / Σ_i w_i |y_i|

The weights w are the setting ``learns``:

    best       the best by score of the answers to a prompt: best-of-n distillation, RAFT (Dong et al. 2023)
    weighted   all of them, by softmax(scores / beta) over the answers to a prompt: reward-weighted regression
               (Peters & Schaal 2007). With many answers one step aims at π exp(r / beta) / Z
    all        each the same; with ``at_least`` rejection-sampling fine-tuning, as STaR (Zelikman et al. 2022)

An answer that scored less than ``at_least`` teaches nothing. The sampler may be any: one that chooses or
searches gives the answers that the policy shall give by itself. With `metropolis` they are states of a Markov
chain with the law p^alpha exp(r / beta), with `best_of_n` the best of more draws than there are rows. What is
learned are whole distributions at temperature 1, however an answer was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Rollout
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, Finite, NonNegative, Positive, settings
from hybrid_jax.models.scoring import shift_states, target_log_probs
from hybrid_jax.parallel.rules import shard_rows
from hybrid_jax.phases.minibatches import update_in_minibatches
from hybrid_jax.phases.references import Reference
from hybrid_jax.phases.rollout_functions import RolloutFunctions
from hybrid_jax.phases.rollout_phase import RolloutPhase
from hybrid_jax.phases.rollout_settings import NO_REWARD, RolloutSettings
from hybrid_jax.phases.step_flops import on_policy_flops
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import check_rows
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Groups, Objective


@PHASES.register("imitation")
@settings
class Imitation(RolloutSettings):
    """Settings of learning from the policy's own chosen answers."""

    reward: CompositeReward = NO_REWARD  # what weighs the answers; none is needed where the sampler chooses
    samples_per_prompt: BatchSize = 1  # answers to each prompt
    sampler: Annotated[Any, SAMPLERS] = Ancestral(max_new_tokens=64)  # how the answers are found: any
    learns: Literal["best", "weighted", "all"] = "all"  # of the answers to a prompt
    beta: Positive = 1.0  # of ``weighted``: how far apart scores must be
    at_least: Finite | None = None  # score below which an answer teaches nothing; null: all do
    references: dict[str, Reference] = field(default_factory=dict)  # for rewards that compare, as opponents
    missing_eos_penalty: NonNegative | None = None  # taken from the score of a response that did not end
    epochs: Count = 1  # times that the updates of a step read its answers
    minibatches: Count = 1  # updates an epoch
    microbatches: Count = 1  # parts in which a minibatch is read, to save memory; the gradient is the same
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(learning_rate=1e-5)  # of the policy

    needs_distribution: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.environment is not None:
            raise ValueError("environment must be left out: imitation learns answers to single prompts")
        if self.learns != "all" and self.samples_per_prompt == 1:
            raise ValueError(f"samples_per_prompt must be at least 2 for learns: {self.learns}, got 1")
        if not self.has_reward and (self.learns != "all" or self.at_least is not None):
            setting = f"learns: {self.learns}" if self.learns != "all" else "at_least"
            raise ValueError(f"reward must be given for {setting}, got none")
        if self.refill_rounds is not None:
            raise ValueError(f"refill_rounds must be null, got {self.refill_rounds}")
        if self.learned_rows % (self.minibatches * self.microbatches):
            raise ValueError(
                f"minibatches × microbatches must divide the {self.learned_rows} answers that a step learns, "
                f"got {self.minibatches} × {self.microbatches}"
            )

    @property
    def learned_rows(self) -> int:
        """Rows that an epoch reads."""
        return self.prompts_per_step if self.learns == "best" else self.rows

    def flops(self, model: Any, prompt_length: int, tokens: Any) -> dict[str, Any]:
        """The metric ``flops`` of one step in which ``tokens`` were sampled; {} where draws are not counted."""
        if getattr(self.sampler, "policy_temperature", None) is None:
            return {}
        return on_policy_flops(
            model,
            self.rows,
            prompt_length,
            self.sampler.max_new_tokens,
            tokens,
            references=[],
            epochs=self.epochs,
            value=None,
            learned=self.learned_rows,
        )

    def build(self, resources: Resources) -> ImitationPhase:
        """The phase, from what the experiment hands out."""
        return ImitationPhase(self, resources)


class ImitationPhase(RolloutPhase):
    """Steps that learn answers of the policy as examples."""

    def __init__(self, config: Imitation, resources: Resources):
        parts = config.minibatches * config.microbatches
        check_rows(resources, "responses", config.rows)
        check_rows(resources, "answers / (minibatches × microbatches)", config.learned_rows // parts)
        if getattr(config.sampler, "reads_texts", False) and jax.process_count() > 1:
            raise UserError(
                f"phases.{resources.name}.sampler.reward must be one on tokens where {jax.process_count()} "
                "processes train: texts need one host; or let phases.….reward choose, with samples_per_prompt"
            )
        super().__init__(config, resources, ImitationFunctions)

    def _learned_with(self, rollout: Any) -> tuple[Any, Mapping[str, Any]]:
        """`RolloutPhase._learned_with`: nothing beside."""
        return (), {}


@dataclass(frozen=True)
class ImitationFunctions(RolloutFunctions):
    """The pure functions of a step, for one model and one setting."""

    optimizer_key: str

    def learn(
        self, state: TrainState, rollout: Rollout, beside: tuple[()], key: Array, rate: Array | float
    ) -> tuple[TrainState, dict[str, Any]]:
        """All updates of one step, on the chosen answers of a rewarded rollout."""
        answers, weights = self.chosen(rollout)
        state, updated, _ = update_in_minibatches(
            self.config,
            self.objective(),
            state,
            (answers, weights),
            None,
            key,
            rate,
            groups=("model",),
            optimizer_key=self.optimizer_key,
            model=self.model,
        )
        learned = Sum(total=jnp.sum(weights * answers.plain_scores), weight=jnp.sum(weights))
        chosen = {"learned_score": learned.mean(), "learned": jnp.mean(weights > 0)}
        tokens = rollout.action_mask.sum()
        prompt_length = rollout.tokens.shape[1] - rollout.action_mask.shape[1]
        work = {"tokens": tokens, **self.config.flops(self.model, prompt_length, tokens)}
        return state, {**self.score_metrics(rollout), **chosen, **updated, **work}

    def chosen(self, rollout: Rollout) -> tuple[Rollout, Float[Array, "L"]]:
        """The answers of a rewarded rollout that are learned, and the weight of each."""
        config, scores = self.config, rollout.scores.reshape(-1, self.config.samples_per_prompt)
        if config.learns == "best":
            best = jnp.arange(len(scores)) * config.samples_per_prompt + jnp.argmax(scores, axis=1)
            rollout = shard_rows(jax.tree.map(lambda x: x[best], rollout))
        weights = jnp.ones(len(rollout.tokens))
        if config.learns == "weighted":
            # Scaled, so that answers of equal scores weigh 1 each, as examples do.
            weights = config.samples_per_prompt * jax.nn.softmax(scores / config.beta, axis=1).reshape(-1)
        if config.at_least is not None:
            told = rollout.plain_scores - self.penalties(self.complete(rollout))
            weights = jnp.where(told >= config.at_least, weights, 0.0)
        return replace(rollout, reference_log_probs={}), weights

    def objective(self) -> Objective:
        """The loss of the group "model" on some answers."""
        model = self.model

        def loss(params: Groups, batch: Any, key: Array):
            (answers, weights), _ = batch
            policy, length = self.whole(params["model"]), answers.action_mask.shape[1]
            hidden, losses = model.hidden_and_losses(policy, answers.tokens, answers.attention_mask)
            states = shift_states(hidden, length)
            log_probs, _ = target_log_probs(model, policy, states, answers.tokens[:, -length:])
            total = jnp.where(answers.action_mask, -weights[:, None] * log_probs, 0.0).sum()
            return {"loss": Sum(total=total, weight=_weight(answers, weights)), **losses}, {}

        def weights(batch: Any) -> dict[str, Any]:
            (answers, weights), _ = batch
            real = answers.attention_mask.sum(where=weights[:, None] > 0)
            return {"loss": _weight(answers, weights), **dict.fromkeys(model.loss_coefs, real)}

        return Objective(loss, weights, {"loss": 1.0, **model.loss_coefs})


def _weight(answers: Rollout, weights: Float[Array, "L"]) -> Float[Array, ""]:
    """How many tokens the answers have, each counted with its weight."""
    return jnp.sum(weights * answers.action_mask.sum(axis=1))
