"""Preferences, online: the policy answers, its answers are compared, and it learns from the pairs at once.

    prompts ─ rollout ─▶ answers with scores ─ pairs ─▶ rows [G K T] ─ loss ─▶ epochs × minibatches of updates

Who stands against whom is the setting ``pairs``:

    best_worst   of the answers to a prompt the best by score against the worst
    opponent     each answer against those of a reference, by the same reward
    example      the data's own answer, taken to be better, against the policy's: SPIN
    group        all answers to a prompt, each with the share of the others that it beats: for the loss ``sppo``

Equal scores teach nothing: such a pair has no weight in the loss. Everything reads the distribution that
sampled: log π and log π_ref are those of ``softmax(logits / temperature)``, so that a KL-regularised optimum
π ∝ π_ref exp(r/β) is one of π at the temperature of the sampler.

Sources: Guo et al. 2024 (online DPO, arXiv 2402.04792); Chen et al. 2024 (SPIN, 2401.01335); Wu et al. 2024
(SPPO, 2405.00675).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from hybrid_jax.algorithms import kto, sppo  # noqa: F401  these fill PREFERENCE_LOSSES
from hybrid_jax.algorithms.preference_losses import PREFERENCE_LOSSES, PreferenceLoss, Sigmoid
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, settings
from hybrid_jax.phases.online_preference_functions import OnlinePreferenceFunctions
from hybrid_jax.phases.references import reference_models
from hybrid_jax.phases.rollout_phase import RolloutPhase
from hybrid_jax.phases.rollout_settings import NO_REWARD, RolloutSettings
from hybrid_jax.phases.step_flops import on_policy_flops
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.base import explores
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Optimizer
from hybrid_jax.training.phase import PHASES, Resources
from hybrid_jax.training.shapes import check_rows


@PHASES.register("online_preference")
@settings
class OnlinePreference(RolloutSettings):
    """Settings of learning from preferences among answers of the policy."""

    reward: CompositeReward = NO_REWARD  # what ranks the answers; ``pairs: example`` needs none
    samples_per_prompt: BatchSize = 2  # answers to each prompt
    pairs: Literal["best_worst", "opponent", "example", "group"] = "best_worst"  # who stands against whom
    loss: Annotated[PreferenceLoss, PREFERENCE_LOSSES] = Sigmoid()  # of a pair; of a group, ``sppo``
    sft_coef: NonNegative | None = None  # of −log π a token of the better answer; null takes the loss's own
    epochs: Count = 1  # times that the updates of a step read its pairs
    minibatches: Count = 1  # updates an epoch
    microbatches: Count = 1  # parts in which a minibatch is read, to save memory; the gradient is the same
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(learning_rate=1e-6)  # of the policy

    def __post_init__(self):
        super().__post_init__()
        if explores(self.sampler):
            raise ValueError(
                "sampler must not explore: what is compared are answers of the policy itself; a policy "
                "gradient with a correction learns from others"
            )
        self._check_pairs()
        kind = PREFERENCE_LOSSES.name_of(type(self.loss))
        wanted = "groups" if self.pairs == "group" else "pairs"
        if self.loss.learns_from != wanted:
            raise ValueError(
                f"loss must learn from {wanted} with pairs: {self.pairs}, got {kind}, which learns from "
                f"{self.loss.learns_from}"
            )
        if self.loss.needs_reference and not sum(r.weight for r in self.references.values()) > 0:
            raise ValueError(f"references must have a weight above 0 together for the loss {kind}, got none")
        if self.num_groups % (self.minibatches * self.microbatches):
            raise ValueError(
                f"minibatches × microbatches must divide the {self.num_groups} pairs or groups of a step, got "
                f"{self.minibatches} × {self.microbatches}"
            )

    def _check_pairs(self) -> None:
        ranked = self.pairs != "example"
        if ranked and self.reward == NO_REWARD:
            raise ValueError(f"reward must be given for pairs: {self.pairs}, got none")
        if self.pairs in ("best_worst", "group") and self.samples_per_prompt == 1:
            raise ValueError(f"samples_per_prompt must be at least 2 for pairs: {self.pairs}, got 1")
        if self.pairs == "opponent" and self.opponent is None:
            raise ValueError("opponent must name a reference for pairs: opponent, got none")
        if self.refill_rounds is not None and self.pairs != "best_worst":
            raise ValueError(f"refill_rounds must be null for pairs: {self.pairs}, got {self.refill_rounds}")

    @property
    def rivals(self) -> Literal["opponent", "example"] | None:
        """`RolloutSettings.rivals`."""
        return self.pairs if self.pairs in ("opponent", "example") else None

    @property
    def num_rivals(self) -> int:
        """Other answers beside each of the policy."""
        if self.pairs == "opponent" and self.opponent is not None:
            return self.opponent.num_samples
        return int(self.pairs == "example")

    @property
    def num_groups(self) -> int:
        """Pairs, or groups, of a step, G."""
        return self.rows * self.num_rivals or self.prompts_per_step

    @property
    def group_size(self) -> int:
        """Answers of a pair, or of a group, K."""
        return self.samples_per_prompt if self.pairs == "group" else 2

    @property
    def learned_rows(self) -> int:
        """Rows that an epoch reads."""
        return self.num_groups * self.group_size

    @property
    def sampled_rows(self) -> int:
        """Responses that policy and opponent sample in a step."""
        return self.rows * (1 + self.num_rivals) if self.pairs == "opponent" else self.rows

    def flops(self, model: Any, prompt_length: int, tokens: Any) -> dict[str, Any]:
        """The metric ``flops`` of one step in which ``tokens`` were sampled: see `on_policy_flops`."""
        return on_policy_flops(
            model,
            self.sampled_rows,
            prompt_length,
            self.sampler.max_new_tokens,
            tokens,
            references=[*reference_models(self.references, model).values()],
            epochs=self.epochs,
            value=None,
            scored=self.rows * (1 + self.num_rivals),
            learned=self.learned_rows,
        )

    def build(self, resources: Resources) -> OnlinePreferencePhase:
        """The phase, from what the experiment hands out."""
        return OnlinePreferencePhase(self, resources)


class OnlinePreferencePhase(RolloutPhase):
    """Steps that learn from preferences among answers of the policy. Trains the group "model"."""

    def __init__(self, config: OnlinePreference, resources: Resources):
        parts = config.minibatches * config.microbatches
        check_rows(resources, "responses", config.rows)
        check_rows(resources, "pairs / (minibatches × microbatches)", config.num_groups // parts)
        super().__init__(config, resources, OnlinePreferenceFunctions)

    def _learned_with(self, rollout: Any) -> tuple[Any, Mapping[str, Any]]:
        """`RolloutPhase._learned_with`: the other answers."""
        return (rollout,) * self.config.num_rivals, {}
