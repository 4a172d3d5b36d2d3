"""Policy gradients of a language model: rollouts, advantages, and updates of an objective on them.

One step, in the order in which it happens:

    rollout      prompts are answered, scored by value and references, and rewarded  (phases/rollout.py)
    rewards      R_t = −β (log π_old(y_t) − log π_ref(y_t)) + [t last] · score       (algorithms/kl.py)
    advantages   A, G from R and V, by the estimator of the method                   (algorithms/advantages.py)
    weights      of tokens in the loss: aggregation × correction                     (algorithms/aggregation.py)
    updates      epochs × minibatches of  policy loss(A) + c_v · value loss(G) − c_H · entropy

The KL to the reference is the single-sample k1 in the reward by default. ``kl_penalty`` puts it into the loss,
token by token, which has another optimum (`hybrid_jax.algorithms.kl`). k1 as a loss has zero expected gradient,
so it is no penalty at all, and k3 in the reward can diverge: neither is a setting (tests/algorithms proves
these statements on a bandit).

A method is a file of defaults: an estimator of advantages and an objective (`hybrid_jax.phases.ppo`). With a
reward on the device, `PolicyGradientFunctions.iteration` is a whole step as one pure function of the state, for
`jax.jit`, `jax.vmap` and `jax.lax.scan`.

Sources: Williams 1992 (REINFORCE); Schulman et al. 2017 (arXiv 1707.06347), Ziegler et al. 2019 (1909.08593),
Ouyang et al. 2022 (2203.02155).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import jax
from jax import Array

from hybrid_jax.algorithms import group_advantages, multistep  # noqa: F401  these fill ADVANTAGES
from hybrid_jax.algorithms.advantages import ADVANTAGES, GAE, Advantage, reads_ratios
from hybrid_jax.algorithms.aggregation import Aggregation, Correction
from hybrid_jax.algorithms.kl import KL_CONTROLS, FixedKL, KLControl, KLPenalty
from hybrid_jax.algorithms.policy_gradient import (
    OBJECTIVES,
    Clipped,
    PolicyObjective,
    RatioLevel,
)
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Natural, NonNegative, Positive, settings
from hybrid_jax.models.base import Params
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.references import reference_models
from hybrid_jax.phases.rollout_phase import RolloutPhase
from hybrid_jax.phases.rollout_settings import RolloutSettings
from hybrid_jax.phases.sft_mix import MixedExamples, SFTMix
from hybrid_jax.phases.step_flops import on_policy_flops
from hybrid_jax.phases.value_network import SeparateStart
from hybrid_jax.sampling.base import explores
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import initial_loss_scale
from hybrid_jax.training.optimizers import OPTIMIZERS, AdamW, Linear, Optimizer
from hybrid_jax.training.phase import PHASES, Metrics, PhaseInit, Resources
from hybrid_jax.training.shapes import check_rows
from hybrid_jax.training.state import RunState


@settings
class OnPolicy(RolloutSettings):
    """Settings of every method; one adds ``advantage`` and ``objective``, as settings or as properties."""

    ratio: RatioLevel = "token"  # whose probabilities a ratio compares, see `log_ratios`
    aggregation: Aggregation = "token_mean"  # how the losses of tokens are added up, see `aggregation`
    correction: Correction | None = None  # of tokens that another policy sampled; null takes them as they are
    epochs: Count = 4  # times that the updates of a step read its rollout
    minibatches: Count = 1  # updates an epoch
    microbatches: Count = 1  # parts in which a minibatch is read, to save memory; the gradient is the same
    value_clip_range: Positive | None = 0.2  # how far one step may move a value
    value_coef: NonNegative = 0.1  # of the value loss
    entropy_coef: NonNegative = 0.0  # of the exact entropy, which is rewarded
    whiten_advantages: bool = True  # scale them to mean 0 and standard deviation 1
    target_kl: Positive | None = None  # nats a token: a step ends once the policy moved so far
    kl_control: Annotated[KLControl, KL_CONTROLS] = FixedKL(0.05)  # how strongly references hold the policy
    kl_penalty: KLPenalty = "reward"  # where they do: in the reward (k1), or in the loss by this estimator
    value_network: Literal["shared", "separate"] = "shared"  # a head on the policy, or a network of its own
    value_init: str | None = None  # a reward model that a separate value network starts from, a folder
    value_warmup_steps: Natural = 0  # steps that train only the value
    sft_mix: SFTMix | None = None  # examples in every update
    optimizer: Annotated[Optimizer, OPTIMIZERS] = AdamW(  # of policy and value together
        learning_rate=1e-5, schedule=Linear(), epsilon=1e-5, weight_decay=0.0
    )

    needs_reward: ClassVar[bool] = True  # what the policy learns from; a teacher may be enough

    def __post_init__(self):
        super().__post_init__()
        if self.rows % (self.minibatches * self.microbatches):
            raise ValueError(
                "minibatches × microbatches must divide the prompts_per_step × samples_per_prompt = "
                f"{self.rows} responses, got {self.minibatches} × {self.microbatches}"
            )
        discount = getattr(self.advantage, "discount", 1)
        if discount != 1 and any(part.level == "potential" for part in self.reward.parts.values()):
            raise ValueError(f"discount must be 1 for a reward with level: potential, got {discount}")
        if self.samples_per_prompt < (least := self.advantage.min_group):
            raise ValueError(f"samples_per_prompt must be at least {least}, got {self.samples_per_prompt}")
        if reads_ratios(self.advantage) and self.correction is not None:
            raise ValueError("correction must be null for an advantage that weighs by ratios itself, as vtrace")
        weighs = self.correction is not None or reads_ratios(self.advantage)
        if explores(self.sampler) and not weighs:
            raise ValueError(
                "correction must be given, or advantage be vtrace, with a sampler that explores: what it draws "
                "has other probabilities than the policy's"
            )
        if self.value_init is not None and self.value_network != "separate":
            raise ValueError(f"value_init needs value_network: separate, got {self.value_network!r}")
        if not self.advantage.needs_value and (self.value_network != "shared" or self.value_warmup_steps):
            raise ValueError(
                "value_network must be shared and value_warmup_steps 0 where advantages need no value, got "
                f"{self.value_network!r} and {self.value_warmup_steps}"
            )

    @property
    def advantage(self) -> Advantage:
        """How much better than expected each token was: the estimator of the method."""
        raise NotImplementedError

    @property
    def objective(self) -> PolicyObjective:
        """The loss of the log-probabilities, given the advantages."""
        raise NotImplementedError

    @property
    def value(self) -> str | None:
        """``shared`` or ``separate``; None for a method without values."""
        return self.value_network if self.advantage.needs_value else None

    def flops(self, model: Any, prompt_length: int, tokens: Any, trains_policy: bool = True) -> dict[str, Any]:
        """The metric ``flops`` of one step in which ``tokens`` were sampled: see `on_policy_flops`."""
        mix = self.sft_mix
        # Comparing the policy with the one that sampled reads the rollout once more, as a reference does.
        compared = [model] if self.correction is not None or reads_ratios(self.advantage) else []
        return on_policy_flops(
            model,
            self.rows,
            prompt_length,
            self.response_length,
            tokens,
            references=[*reference_models(self.references, model).values(), *compared],
            epochs=self.epochs,
            value=self.value,
            trains_policy=trains_policy,
            examples=(self.minibatches * mix.batch_size, mix.length) if mix else (0, 0),
        )

    def build(self, resources: Resources) -> PolicyGradientPhase:
        """The phase, from what the experiment hands out."""
        return PolicyGradientPhase(self, resources)


@PHASES.register("policy_gradient")
@settings
class PolicyGradient(OnPolicy):
    """Any estimator with any objective. A method of your own may be a subclass with other defaults."""

    advantage: Annotated[Advantage, ADVANTAGES] = GAE()  # pyright: ignore  a setting in place of a property
    objective: Annotated[PolicyObjective, OBJECTIVES] = Clipped()  # pyright: ignore


class PolicyGradientPhase(RolloutPhase):
    """Steps of a policy gradient. Trains the group "model" and its own value, if the method has one."""

    def __init__(self, config: OnPolicy, resources: Resources):
        if config.needs_reward and config.environment is None and not config.has_reward:
            here = f"phases.{resources.name}"
            raise UserError(
                f"{here}.reward must be set, or {here}.environment, which rewards itself; got neither"
            )
        parts = config.minibatches * config.microbatches
        check_rows(resources, "responses / (minibatches × microbatches)", config.rows // parts)
        super().__init__(config, resources, PolicyGradientFunctions)
        mix = config.sft_mix
        self.examples = None if mix is None else MixedExamples(mix, config.minibatches, resources)
        value_key, model = self.functions.value_key, resources.model
        start = SeparateStart(value_key, config.value_init, model, self._placement)
        self._start_value = start if config.value == "separate" else None

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        """Adds the value, if there is one, optimizer states, KL control, references, the reward's state."""
        added = self.functions.init_value(params["model"])
        groups = {"model": params["model"], **added}
        transform = layer_by_layer(self.config.optimizer.transform())
        return PhaseInit(
            params=added,
            opt_state={group: transform.init(tree) for group, tree in groups.items()},
            extra={
                self.functions.kl_key: self.config.kl_control.init(),
                **initial_loss_scale(self.functions.model),
                **self.rollouts.init_extra(),
            },
            host=self.rollouts.init_host(),
            references=self.rollouts.references.init(params["model"]),
        )

    def stage(self, state: RunState) -> str:
        """``value alone`` while the value warms up."""
        steps = state.schedule.steps.get(self.name, 0)
        return "value alone" if steps < self.config.value_warmup_steps else ""

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """One step: references, rollout, updates; then what the next step is to find."""
        clock = Clock()
        steps = state.schedule.steps.get(self.name, 0)
        state = self.rollouts.references.updated(state)
        if self._start_value is not None and not steps:
            state = replace(state, train=replace(state.train, params=self._start_value(state)))
        examples = None if self.examples is None else self.examples.batch(state.cursors)
        sample_key, learn_key = jax.random.split(key)
        played = self.rollouts.play(state, key, sample_key, clock)
        groups = (self.functions.value_key,) if self.stage(state) else self.functions.groups
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        train, metrics = self._learn(
            state.base,
            self.rollouts.lent(state.train),
            played.rollout,
            examples,
            learn_key,
            rate,
            groups=groups,
        )
        # The update has been started, so that the device does not wait while the host looks at the clock.
        state = self.rollouts.kept(state, train, played, clock)
        if self.examples is not None:
            state = replace(state, cursors={**state.cursors, **self.examples.advanced(state.cursors)})
        metrics = {**metrics, **played.metrics, **clock.seconds, "learning_rate": rate}
        metrics["dispatch_seconds"] = time.perf_counter() - clock.started
        return state, {f"{self.name}/{name}": number for name, number in metrics.items()}

    def _learned_with(self, rollout: Any) -> tuple[Any, Mapping[str, Any]]:
        """`RolloutPhase._learned_with`: the examples of an update."""
        examples = None if self.examples is None else self.examples.shapes()
        return examples, {"groups": self.functions.groups}
