"""The settings of PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from hybrid_jax.algorithms.kl_control import KL_CONTROLS, FixedKL, KLControl
from hybrid_jax.core.registry import UserError
from hybrid_jax.data.long_rows import LongRows, Policy
from hybrid_jax.data.sources import SOURCES
from hybrid_jax.phases.sft import SFT
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.sampling.decode import Sampler
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Linear, Optimizer
from hybrid_jax.training.phase import PHASES, Phase, Resources


@dataclass(frozen=True)
class Reference:
    """A frozen copy of the policy that holds the trained one back."""

    weight: float = 1.0
    frozen_at: Literal["start", "first_step"] = (
        "first_step"  # of the run, or of this phase (the SFT checkpoint)
    )
    refresh_every_cycles: int | None = None  # copy the policy again each time this phase was entered n times
    path: str | None = None  # another model in place of a copy: a Hugging Face folder of the same shape

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if self.refresh_every_cycles is not None and self.refresh_every_cycles < 1:
            raise ValueError(f"refresh_every_cycles must be at least 1, got {self.refresh_every_cycles}")
        if self.path is not None and self.refresh_every_cycles is not None:
            raise ValueError("refresh_every_cycles must be null for a reference with a path: it never changes")

    def is_due(self, cycle: int, entered: bool) -> bool:
        """Whether to copy the policy again at the start of a step; ``cycle`` counts the entries before it."""
        return self.refresh_every_cycles is not None and entered and cycle % self.refresh_every_cycles == 0


@dataclass(frozen=True)
class Opponent:
    """Who answers the same prompts, for rewards that compare: the texts are their column ``opponents``."""

    reference: str  # the name of a reference
    num_samples: int = 1  # of its answers to each prompt

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")


@dataclass(frozen=True)
class SFTMix:
    """Examples mixed into every PPO update: PPO-ptx (Ouyang et al. 2022), ``+ coef · cross-entropy``."""

    coef: float
    batch_size: int = 16  # rows a minibatch
    length: int = 256
    long_rows: Policy = "truncate_end"  # as in `SFT`
    packing: bool = True

    def __post_init__(self):
        if self.coef <= 0:
            raise ValueError(f"coef must be positive, got {self.coef}")

    def as_sft(self) -> SFT:
        rows: Any = {"length": self.length, "long_rows": self.long_rows, "packing": self.packing}
        return SFT(batch_size=self.batch_size, **rows)


@PHASES.register("ppo")
@dataclass(frozen=True)
class PPO:
    """Settings of PPO; the defaults are those that work for most language models."""

    reward: CompositeReward
    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    max_prompt_length: int | None = None  # tokens; None takes what the model's context leaves
    long_prompts: Literal["drop", "truncate_start", "error"] = "drop"  # one cut at its end asks nothing
    prompt_buckets: tuple[int, ...] | None = None  # lengths that prompts are padded to; each compiles once
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
    opponent: Opponent | None = None

    rollout_weights: Literal["fsdp", "tensor", "replicated"] = "tensor"  # see `parallel.rules.ROLLOUTS`
    rollout_ahead: bool = False  # answer the next prompts before the update, with the policy before it
    value_network: Literal["shared", "separate"] = "shared"  # a head on the policy, or a network of its own
    value_init: str | None = None  # a reward model that a separate value network starts from, a folder
    value_warmup_steps: int = 0  # steps that train only the value
    sft_mix: SFTMix | None = None
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(
        learning_rate=1e-5, schedule=Linear(), epsilon=1e-5, weight_decay=0.0
    )

    def __post_init__(self):
        for name in ("prompts_per_step", "samples_per_prompt", "epochs", "minibatches", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        buckets = self.prompt_buckets
        if buckets is not None and (not buckets or min(buckets) < 1 or len(set(buckets)) < len(buckets)):
            raise ValueError(f"prompt_buckets must hold different lengths of at least 1, got {list(buckets)}")
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
        if self.sampler.top_k is not None or self.sampler.top_p is not None or self.sampler.temperature == 0:
            raise ValueError(
                "sampler must not truncate (top_k, top_p) or be greedy: PPO learns from the distribution "
                "that it samples, over the whole vocabulary"
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
