"""Settings of every on-policy phase: the prompts, how they are answered, and the reward of the answers."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, NonNegative, settings
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.dialogue.conversation import ConversationSettings
from hybrid_jax.environments.base import ENVIRONMENTS
from hybrid_jax.phases.references import Reference
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.rewards.part import Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS

NO_REWARD = CompositeReward({"nothing": Part(TokenCount(weights={}))})  # of a phase that needs none


@settings
class Opponent:
    """Who answers the same prompts, for rewards that compare: the texts are their column ``opponents``."""

    reference: str  # the name of a reference
    num_samples: BatchSize = 1  # of its answers to each prompt


@settings
class RolloutSettings:
    """How a phase makes its rollouts."""

    reward: CompositeReward = NO_REWARD  # what a response earns; with an environment each answer, beside it
    environment: Annotated[Any, ENVIRONMENTS] | None = (
        None  # whom the policy talks with; null: one answer a prompt
    )
    held_out_environment: Annotated[Any, ENVIRONMENTS] | None = (
        None  # whom it talks with at evaluations, such as games that training never plays; null: the same
    )
    conversation: ConversationSettings = ConversationSettings()  # how, with an environment
    prompts_per_step: BatchSize = 64  # how many prompts a step answers
    samples_per_prompt: BatchSize = 1  # answers to each prompt
    max_prompt_length: Count | None = None  # tokens; None takes what the model's context leaves
    long_prompts: Literal["drop", "drop_turns", "truncate_start", "error"] = (
        "drop"  # one cut at its end asks nothing
    )
    prompt_buckets: Annotated[tuple[Count, ...], MinLen(1)] | None = None  # padded lengths; each compiles once
    sampler: Annotated[Any, SAMPLERS] = Ancestral(
        max_new_tokens=64
    )  # how the policy answers; whole distributions only
    prompts: Literal["own", "shared"] = "own"  # shared: those of the batch that the phase of SFT learned last
    source: Annotated[Any, SOURCES] | None = None  # prompts of its own; None takes the run's
    missing_eos_penalty: NonNegative | None = 1.0  # taken from the score of a response that did not end
    references: dict[str, Reference] = field(  # copies or folders that the policy is held to
        default_factory=lambda: {"sft": Reference()}
    )
    opponent: Opponent | None = None  # who else answers, for rewards that compare
    rollout_weights: Literal["fsdp", "tensor", "replicated"] = "tensor"  # see `parallel.rules.ROLLOUTS`
    refill_rounds: Count | None = (
        None  # batches asked at most to replace prompts whose answers all earn the same
    )
    rollout_ahead: bool = False  # answer the next prompts before the update, with the policy before it

    needs_distribution: ClassVar[bool] = True  # whether what is learned reads the log-probs of the sampler

    def __post_init__(self):
        if self.prompt_buckets is not None and len(set(self.prompt_buckets)) < len(self.prompt_buckets):
            raise ValueError(f"prompt_buckets must be different lengths, got {list(self.prompt_buckets)}")
        self._check_environment()
        if self.prompts == "shared" and (self.source is not None or self.rollout_ahead):
            given = "a source" if self.source is not None else "rollout_ahead: true"
            raise ValueError(f"prompts: shared takes neither a source nor rollout_ahead, got {given}")
        if self.refill_rounds is not None and (self.prompts == "shared" or self.rollout_ahead):
            given = "prompts: shared" if self.prompts == "shared" else "rollout_ahead: true"
            raise ValueError(f"refill_rounds must be null with {given}: which prompts follow is open")
        if self.refill_rounds is not None and self.samples_per_prompt == 1:
            raise ValueError("samples_per_prompt must be at least 2 for refill_rounds, got 1")
        in_groups = [f"parts.{n}.normalise: group" for n, p in self.reward.parts.items() if p.is_in_groups]
        if self.reward.baseline is not None and self.reward.baseline.kind == "others":
            in_groups.append("baseline: {kind: others}")
        if in_groups and self.samples_per_prompt == 1:
            raise ValueError(f"samples_per_prompt must be at least 2 for reward.{in_groups[0]}, got 1")
        if self.opponent is not None and self.opponent.reference not in self.references:
            known = ", ".join(self.references) or "none"
            raise ValueError(f"opponent.reference must be one of {known}, got {self.opponent.reference!r}")
        if self.needs_distribution and getattr(self.sampler, "policy_temperature", None) is None:
            raise ValueError(
                "sampler must not truncate (top_k, top_p, min_p, typical_p), penalise, be greedy, choose or "
                "search: a policy learns from the distribution that it samples, over the whole vocabulary; "
                "imitation learns from any"
            )

    def _check_environment(self) -> None:
        """Refuses settings that are about one answer to one prompt."""
        if self.environment is None:
            if self.held_out_environment is not None:
                raise ValueError("held_out_environment needs an environment to train in, got none")
            return
        off = {
            "prompts": self.prompts == "own",
            "refill_rounds": self.refill_rounds is None,
            "rollout_ahead": not self.rollout_ahead,
            "opponent": self.opponent is None,
            "sampler.slots": getattr(self.sampler, "slots", None) is None,
            "reward": not (self.has_reward and self.reward.on_device),
            "reward.parts.*.level": not self.reward.is_placed,
        }
        if wrong := [name for name, fine in off.items() if not fine]:
            hint = {"sampler.slots": "; conversation.slots is meant", "reward": ", not a reward on tokens"}
            raise ValueError(f"{wrong[0]} must be left out with an environment{hint.get(wrong[0], '')}")
        if not isinstance(self.sampler, Ancestral):
            raise ValueError("sampler must be ancestral with an environment")
        if self.answered_by is not None and self.answered_by not in self.references:
            known = ", ".join(self.references) or "none"
            raise ValueError(f"environment.answered_by must be one of {known}, got {self.answered_by!r}")
        other = getattr(self.held_out_environment or self.environment, "answered_by", None)
        if other != self.answered_by:
            name = self.answered_by
            raise ValueError(f"held_out_environment.answered_by must be {name}, as of environment, got {other}")

    @property
    def answered_by(self) -> str | None:
        """The reference that answers, too: as the opponent, or as who plays a part in the environment."""
        if self.opponent is not None:
            return self.opponent.reference
        return getattr(self.environment, "answered_by", None)

    @property
    def has_reward(self) -> bool:
        """Tells whether anything beside an environment gives a reward."""
        return self.reward != NO_REWARD

    @property
    def response_length(self) -> int:
        """Tokens behind a prompt at most, R: of one answer, or of a conversation."""
        return self.sampler.max_new_tokens if self.environment is None else self.conversation.max_tokens

    @property
    def rows(self) -> int:
        """Responses a step, B."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def learned_rows(self) -> int:
        """Rows that an epoch reads."""
        return self.rows

    @property
    def sampled_rows(self) -> int:
        """Responses that are sampled in a step, as far as its arithmetic counts them."""
        return self.rows

    @property
    def rivals(self) -> Literal["opponent", "example"] | None:
        """Other answers that the references score beside the policy's: the opponent's, or those of the data.

        The reward scores an opponent's, too. A phase that compares answers says so.
        """
        return None

    def longest_prompt(self, name: str, context: int | None) -> tuple[int | None, LongRows]:
        """Tokens of a prompt at most, and what becomes of a longer one.

        Args:
            name: of the phase.
            context: tokens that the model can read; a whole response must fit behind a prompt.

        Raises:
            UserError: the context leaves no room for a prompt.
        """
        here, new = f"phases.{name}", self.sampler.max_new_tokens
        room = None if context is None else context - new
        if room is not None and room < 1:
            raise UserError(
                f"{here}.sampler.max_new_tokens must leave room for a prompt in the context of {context} "
                f"tokens, got {new}"
            )
        limits = [limit for limit in (room, self.max_prompt_length) if limit is not None]
        most, choice = min(limits, default=None), f"{here}.long_prompts"
        if most == self.max_prompt_length:
            return most, LongRows(self.long_prompts, f"{here}.max_prompt_length", choice, rows="prompts")
        limit = f"the model's max_length less {here}.sampler.max_new_tokens"
        return most, LongRows(
            self.long_prompts, limit, choice, f"lower {here}.sampler.max_new_tokens", "prompts"
        )
