"""A phase that answers prompts and learns from the answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax import Array

from hybrid_jax.models.base import Params
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.conversation_rollouts import ConversationRollouts
from hybrid_jax.phases.rollout import Rollouts
from hybrid_jax.phases.rollout_functions import above_base
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.loss_scale import initial_loss_scale
from hybrid_jax.training.offload import without_idle
from hybrid_jax.training.phase import Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import key_shape, rate_shape
from hybrid_jax.training.state import RunState


class RolloutPhase:
    """The steps and the programs of such a phase; here it trains the group "model" alone.

    Args:
        config: `RolloutSettings`, with ``optimizer``, ``epochs``, ``minibatches`` and ``microbatches``.
        resources: what the experiment hands to a phase.
        functions: makes the pure functions of a step, among them ``learn``.
    """

    def __init__(self, config: Any, resources: Resources, functions: Callable[..., Any]):
        self.config = config
        self.waits_for_device = not config.rollout_ahead
        self.shapes_setting = f"phases.{resources.name}.prompt_buckets, the lengths that prompts are padded to"
        self.name, self.kind, self.optimizer_key = resources.name, resources.kind, resources.optimizer_key
        self._horizon, self._offload = resources.horizon, resources.offload
        self._placement = resources.placement
        model, eos_ids = resources.model, resources.eos_ids
        self.functions = functions(config, model, eos_ids, self.name, self.optimizer_key)
        self._program = functools.partial(above_base, self.functions)
        rollouts = Rollouts if config.environment is None else ConversationRollouts
        self.rollouts = rollouts(self.functions, resources, self._program)
        self.references = self.rollouts.references.names
        self._rate = jax.jit(config.optimizer.rate)
        learn = under(self._placement, self._program("learn"))
        self._learn = jax.jit(learn, donate_argnums=1, static_argnames="groups")

    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        """Adds the state of the optimizer, the references, and the reward's state."""
        transform = layer_by_layer(self.config.optimizer.transform())
        return PhaseInit(
            opt_state={"model": transform.init(params["model"])},
            extra={**initial_loss_scale(self.functions.model), **self.rollouts.init_extra()},
            host=self.rollouts.init_host(),
            references=self.rollouts.references.init(params["model"]),
        )

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """One step: references, rollout, updates; then what the next step is to find."""
        clock = Clock()
        steps = state.schedule.steps.get(self.name, 0)
        state = self.rollouts.references.updated(state)
        sample_key, learn_key = jax.random.split(key)
        played = self.rollouts.play(state, key, sample_key, clock)
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        train = self.rollouts.lent(state.train)
        train, metrics = self._learn(state.base, train, played.rollout, played.rivals, learn_key, rate)
        # The update has been started, so that the device does not wait while the host looks at the clock.
        state = self.rollouts.kept(state, train, played, clock)
        metrics = {**metrics, **played.metrics, **clock.seconds, "learning_rate": rate}
        metrics["dispatch_seconds"] = time.perf_counter() - clock.started
        return state, {f"{self.name}/{name}": number for name, number in metrics.items()}

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """Tells the reward what the evaluation measured."""
        return self.rollouts.observe(state, numbers)

    def converse(self, state: RunState) -> tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]:
        """Holds the conversations of an evaluation, where the phase has an environment."""
        if not isinstance(self.rollouts, ConversationRollouts):
            return {}, []
        return self.rollouts.held_out(state)

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        """The programs that a step compiles: sampling, scoring and the updates."""
        config, length = self.config, self.rollouts.longest_prompt(prompt_length)
        state, idle = without_idle(state, self)
        references = self.rollouts.references.shapes(state)
        others = {name: tree for name, tree in state.references.items() if name not in self.references}
        waiting = {"optimizer_states": idle, "references": others}
        waiting = {name: trees for name, trees in waiting.items() if name not in self._offload}
        programs, rollout = self.rollouts.programs(state, length, waiting)
        key, rate = key_shape(self._placement), rate_shape(self._placement)
        beside, settings = self._learned_with(rollout)
        learn = Program(
            f"{self.name}/learn",
            self._learn,
            (state.base, self.rollouts.lent(state.train), rollout, beside, key, rate),
            settings=settings,
            tokens=config.epochs * config.learned_rows * (length + config.response_length),
            learns=True,
            beside=(references, waiting),
        )
        return [*programs, learn]

    def _learned_with(self, rollout: Any) -> tuple[Any, Mapping[str, Any]]:
        """The shapes of what ``learn`` reads beside a rollout, and its settings by name."""
        return None, MappingProxyType({})
