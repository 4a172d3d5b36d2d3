"""A phase that answers prompts and learns from the answers; what it learns is its own."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax import Array

from hybrid_jax.models.base import Params
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.conversation_rollouts import ConversationRollouts
from hybrid_jax.phases.rollout import Rollouts
from hybrid_jax.phases.rollout_functions import above_base
from hybrid_jax.training.offload import without_idle
from hybrid_jax.training.phase import Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import key_shape, rate_shape
from hybrid_jax.training.state import RunState


class RolloutPhase(ABC):
    """The rollouts and the programs of such a phase, which trains the group "model" at least.

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

    @abstractmethod
    def init(self, params: Mapping[str, Params], key: Array) -> PhaseInit:
        """`Phase.init`."""

    @abstractmethod
    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """`Phase.step`."""

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
