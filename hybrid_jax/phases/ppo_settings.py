"""The settings of PPO."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from hybrid_jax.algorithms.kl_control import KL_CONTROLS, FixedKL, KLControl
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import BatchSize, Count, Natural, NonNegative, Positive, Share, settings
from hybrid_jax.data.long_rows import LongRows, Policy
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.phases.sft import SFT
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Linear, Optimizer
from hybrid_jax.training.phase import PHASES, Phase, Resources


@settings
class Reference:
    """A frozen copy of the policy that holds the trained one back."""

    weight: NonNegative = 1.0
    frozen_at: Literal["start", "first_step"] = (
        "first_step"  # of the run, or of this phase (the SFT checkpoint)
    )
    refresh_every_cycles: Count | None = None  # copy the policy again each time this phase was entered n times
    path: str | None = None  # another model in place of a copy: a Hugging Face folder of the same shape

    def __post_init__(self):
        if self.path is not None and self.refresh_every_cycles is not None:
            raise ValueError("refresh_every_cycles must be null for a reference with a path: it never changes")

    def is_due(self, cycle: int, entered: bool) -> bool:
        """Whether to copy the policy again at the start of a step; ``cycle`` counts the entries before it."""
        return self.refresh_every_cycles is not None and entered and cycle % self.refresh_every_cycles == 0


@settings
class Opponent:
    """Who answers the same prompts, for rewards that compare: the texts are their column ``opponents``."""

    reference: str  # the name of a reference
    num_samples: BatchSize = 1  # of its answers to each prompt


@settings
class SFTMix:
    """Examples mixed into every PPO update: PPO-ptx (Ouyang et al. 2022), ``+ coef · cross-entropy``."""

    coef: Positive
    batch_size: BatchSize = 16  # rows a minibatch
    length: Annotated[int, Ge(2)] = 256
    long_rows: Policy = "truncate_end"  # as in `SFT`
    packing: bool = True

    def as_sft(self) -> SFT:
        rows: Any = {"length": self.length, "long_rows": self.long_rows, "packing": self.packing}
        return SFT(batch_size=self.batch_size, **rows)


@PHASES.register("ppo")
@settings
class PPO:
    """Settings of PPO; the defaults are those that work for most language models."""

    reward: CompositeReward
    prompts_per_step: BatchSize = 64
    samples_per_prompt: BatchSize = 1
    max_prompt_length: Count | None = None  # tokens; None takes what the model's context leaves
    long_prompts: Literal["drop", "truncate_start", "error"] = "drop"  # one cut at its end asks nothing
    prompt_buckets: Annotated[tuple[Count, ...], MinLen(1)] | None = None  # padded lengths; each compiles once
    sampler: Annotated[Any, SAMPLERS] = Ancestral(max_new_tokens=64)
    source: Annotated[Any, SOURCES] | None = None  # prompts of its own; None takes the run's

    epochs: Count = 4
    minibatches: Count = 1
    microbatches: Count = 1  # parts in which a minibatch is read, to save memory; the gradient is the same
    discount: Share = 1.0
    trace: Share = 0.95
    clip_range: Positive = 0.2
    value_clip_range: Positive | None = 0.2
    value_coef: NonNegative = 0.1
    entropy_coef: NonNegative = 0.0
    whiten_advantages: bool = True
    missing_eos_penalty: NonNegative | None = 1.0  # taken from the score of a response that did not end
    target_kl: Positive | None = None  # nats a token: a step ends once the policy moved so far
    kl_control: Annotated[KLControl, KL_CONTROLS] = FixedKL(0.05)
    references: dict[str, Reference] = field(default_factory=lambda: {"sft": Reference()})
    opponent: Opponent | None = None

    rollout_weights: Literal["fsdp", "tensor", "replicated"] = "tensor"  # see `parallel.rules.ROLLOUTS`
    rollout_ahead: bool = False  # answer the next prompts before the update, with the policy before it
    value_network: Literal["shared", "separate"] = "shared"  # a head on the policy, or a network of its own
    value_init: str | None = None  # a reward model that a separate value network starts from, a folder
    value_warmup_steps: Natural = 0  # steps that train only the value
    sft_mix: SFTMix | None = None
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(
        learning_rate=1e-5, schedule=Linear(), epsilon=1e-5, weight_decay=0.0
    )

    def __post_init__(self):
        if self.prompt_buckets is not None and len(set(self.prompt_buckets)) < len(self.prompt_buckets):
            raise ValueError(f"prompt_buckets must be different lengths, got {list(self.prompt_buckets)}")
        if self.rows % (self.minibatches * self.microbatches):
            raise ValueError(
                "minibatches × microbatches must divide the prompts_per_step × samples_per_prompt = "
                f"{self.rows} responses, got {self.minibatches} × {self.microbatches}"
            )
        if self.discount != 1 and any(part.level == "potential" for part in self.reward.parts.values()):
            raise ValueError(f"discount must be 1 for a reward with level: potential, got {self.discount}")
        in_groups = [f"parts.{n}.normalise: group" for n, p in self.reward.parts.items() if p.is_in_groups]
        if self.reward.baseline is not None and self.reward.baseline.kind == "others":
            in_groups.append("baseline: {kind: others}")
        if in_groups and self.samples_per_prompt == 1:
            raise ValueError(f"samples_per_prompt must be at least 2 for reward.{in_groups[0]}, got 1")
        if self.value_init is not None and self.value_network != "separate":
            raise ValueError(f"value_init needs value_network: separate, got {self.value_network!r}")
        if self.opponent is not None and self.opponent.reference not in self.references:
            known = ", ".join(self.references) or "none"
            raise ValueError(f"opponent.reference must be one of {known}, got {self.opponent.reference!r}")
        if getattr(self.sampler, "policy_temperature", None) is None:
            raise ValueError(
                "sampler must not truncate (top_k, top_p), be greedy, choose or search: PPO learns from the "
                "distribution that it samples, over the whole vocabulary"
            )

    @property
    def rows(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

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

    def build(self, resources: Resources) -> Phase:
        from hybrid_jax.phases.ppo import PPOPhase

        return PPOPhase(self, resources)
