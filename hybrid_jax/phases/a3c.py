"""Asynchronous advantage actor-critic (A3C): actors that do not wait for each other.

    actor        copies the parameters θ_k, samples with them, rewards the texts, computes a gradient g
    shared       θ_{j+1} = θ_j − α g, in the order in which gradients arrive: j − k updates lie between

Each actor is a thread, so one reward that takes long holds up one actor alone. A step of the phase is one
update: rollouts go on between steps, and during steps of other phases only where nobody knows that they come.
The gradient is taken at θ_k, whose own responses they are. An estimator that compares policies (``vtrace``), or
a ``correction``, takes it at the newest parameters instead, and weighs the responses of θ_k by their ratios.

``max_staleness`` bounds j − k: an actor waits before it begins where another might be overtaken too often.
Nothing that was begun is thrown away, so what is learned has the lengths of what is sampled.

**What resumes exactly.** With one actor every step is that of `hybrid_jax.phases.a2c`, bit for bit, also after
a kill. With several a checkpoint is exact (parameters, optimizer, prompts under way), while the order in which
actors arrive is not: a resumed run answers the prompts that were under way again, before new ones.

On a mesh of several devices each actor takes one for itself, and the model must fit on it; there are no
collectives in an actor, so that programs of several threads cannot block each other.

Source: Mnih et al. 2016 (arXiv 1602.01783, algorithm S3); Espeholt et al. 2018 (1802.01561).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_jax.algorithms.advantages import reads_ratios
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Branch
from hybrid_jax.core.ranges import BatchSize, Count, settings
from hybrid_jax.parallel import hosts
from hybrid_jax.parallel.mesh import MeshConfig
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.a2c import A2C
from hybrid_jax.phases.actors import Actors, Begun, Work
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.policy_gradient import PolicyGradientPhase
from hybrid_jax.phases.references import copied
from hybrid_jax.training.loss_scale import STATE as LOSS_SCALE
from hybrid_jax.training.phase import PHASES, Metrics, PhaseInit, Program, Resources
from hybrid_jax.training.shapes import key_shape, rate_shape
from hybrid_jax.training.state import RunState, TrainState

BINS = 8  # of the histogram of staleness: 0, 1, …, and the last for all above


@PHASES.register("a3c")
@settings
class A3C(A2C):
    """Settings of A3C: those of A2C, for each actor. A reward is asked by several threads at once."""

    actors: BatchSize = 4  # threads; more than devices keep a device busy while rewards are waited for
    max_staleness: Count = (
        64  # updates between an actor's copy of the parameters and the update by its gradient
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_staleness < self.actors - 1:
            raise ValueError(
                f"max_staleness must be at least actors - 1 = {self.actors - 1}, got {self.max_staleness}"
            )
        fixed = {"epochs": 1, "minibatches": 1, "target_kl": None, "sft_mix": None, "refill_rounds": None}
        for name, value in {**fixed, "rollout_ahead": False, "prompts": "own"}.items():
            if (got := getattr(self, name)) != value:
                raise ValueError(f"{name} must be {value} for actors, each update is one gradient; got {got}")

    def build(self, resources: Resources) -> A3CPhase:
        """The phase, from what the experiment hands out."""
        return A3CPhase(self, resources)


class _Shared:
    """The state that actors share, under its lock: the newest parameters, and the memory of the reward."""

    def __init__(self, newest: TrainState, reward_state: Any):
        self.lock = threading.Lock()
        self.newest, self.reward_state = newest, reward_state
        self.left = reward_state  # as the state holds it that was returned last


class A3CPhase(PolicyGradientPhase):
    """Steps of A3C: each waits for one gradient, applies it, and lets actors begin."""

    def __init__(self, config: A3C, resources: Resources):
        if hosts.size() > 1:
            raise UserError(
                f"phases.{resources.name}: a3c needs a run of one process, got {hosts.size()}; use a2c"
            )
        super().__init__(config, resources)
        self._in_a_row, self._num_actors = resources.in_a_row, config.actors
        self._actors = Actors(self.name, config.actors, config.max_staleness)
        self._compares = config.correction is not None or reads_ratios(config.advantage)
        self._read = ("model", self.functions.value_key)  # the groups of parameters
        self._copy = jax.jit(under(self._placement, copied))
        apply = under(self._placement, self._program("apply"))
        self._apply = jax.jit(apply, donate_argnums=1)
        devices = list(self._placement.mesh.devices.flat)
        alone = len(devices) == 1
        placements = [self._placement] if alone else [MeshConfig().placement([d]) for d in devices]
        self._gradients, self._rollouts = [], []
        for placement in placements[: config.actors]:
            self._rollouts.append(self.rollouts if alone else self.rollouts.on(placement))
            gradient = under(placement, self._program("gradient"))
            self._gradients.append(jax.jit(gradient, static_argnames="groups"))
        self._places = [NamedSharding(placement.mesh, PartitionSpec()) for placement in placements]
        self._shared: _Shared | None = None
        self._left: tuple[int, dict[str, int]] | None = None  # step and prompts of what was returned last

    @property
    def _counts_key(self) -> str:
        """The key of the histogram of staleness in ``RunState.host``."""
        return f"{self.name}/staleness"

    def init(self, params: Mapping[str, Any], key: Array) -> PhaseInit:
        """Adds the parts of a policy gradient and the histogram of staleness."""
        added = super().init(params, key)
        return replace(added, host={**added.host, self._counts_key: np.zeros(BINS, np.int64)})

    def step(self, state: RunState, key: Array) -> tuple[RunState, Metrics]:
        """One update by the gradient that arrives next."""
        clock = Clock()
        steps = state.schedule.steps.get(self.name, 0)
        state = self.rollouts.references.updated(state)
        if self._start_value is not None and not steps:
            state = replace(state, train=replace(state.train, params=self._start_value(state)))
        shared = self._found(state)
        cursor, again = self._begin(state, shared, key, steps)
        clock.lap("input")
        begun, (gradient, metrics, of_reward) = self._actors.next()
        clock.lap("rollout")
        rate = self._rate(*jax.device_put((steps, self._horizon)))
        gradient, metrics = self._placed(state.train, gradient, metrics)
        train, applied = self._apply(state.base, state.train, gradient, metrics, rate)
        counts, staleness = self._counted(state, begun)
        with shared.lock:
            reward_state = shared.left = shared.reward_state
        host = {**state.host, self.rollouts.reward_key: reward_state, self._counts_key: counts}
        new = replace(state, train=train, host=host, cursors=self._cursors(state, cursor, again))
        self._left = (state.step + 1, self._own(new))
        metrics = {**applied, **of_reward, **clock.seconds, **staleness, "learning_rate": rate}
        return new, {f"{self.name}/{name}": number for name, number in metrics.items()}

    def programs(self, state: RunState, prompt_length: int | None = None) -> list[Program]:
        """The programs of an actor, on the mesh of the run, and the update by its gradient."""
        *programs, learn = super().programs(state, prompt_length)
        base, train, rollout, _, _, _ = learn.arguments
        seen = TrainState({n: x for n, x in train.params.items() if n in self._read}, {}, train.extra)
        groups = {"groups": self.functions.groups}
        inputs = (base, seen, rollout, key_shape(self._placement))
        of_gradient = jax.eval_shape(partial(self._gradients[0], **groups), *inputs)
        gradient = {group: train.params[group] for group in self.functions.groups}
        name = f"{self.name}/gradient"
        return [
            *programs,
            replace(learn, name=name, function=self._gradients[0], arguments=inputs, settings=groups),
            Program(
                f"{self.name}/apply",
                self._apply,
                (base, train, gradient, of_gradient[1], rate_shape(self._placement)),
                beside=learn.beside,
            ),
        ]

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """Tells the reward what the evaluation measured; actors that are under way hear of it."""
        shared = self._shared
        if shared is None or self._left is None or self._own(state) != self._left[1]:
            return super().observe(state, numbers)
        with shared.lock:
            known = {**state.host, self.rollouts.reward_key: shared.reward_state}
            state = super().observe(replace(state, host=known), numbers)
            shared.left = shared.reward_state = state.host[self.rollouts.reward_key]
        return state

    def _found(self, state: RunState) -> _Shared:
        """The state that actors share; begun anew where ``state`` is not the one that this phase left."""
        left = self._left
        remembered = state.host[self.rollouts.reward_key]
        goes_on = left is not None and state.step >= left[0] and self._own(state) == left[1]
        if self._shared is None or not goes_on or remembered is not self._shared.left:
            self._actors.under_way = []
            self._shared = _Shared(state.train, remembered)
        return self._shared

    def _own(self, state: RunState) -> dict[str, int]:
        """The cursors of the phase: of its next prompts, and of those under way."""
        return {n: c for n, c in state.cursors.items() if n == self.name or n.startswith(f"{self.name}/actor_")}

    def _begin(self, state: RunState, shared: _Shared, key: Array, steps: int) -> tuple[int, list[int]]:
        """Lets actors begin, each with the parameters of now.

        Returns the cursor of the next new prompts, and those of prompts that are still to be answered again.
        """
        under_way = {begun.cursor for begun in self._actors.under_way}
        cursor = state.cursors.get(self.name, 0)
        # After a kill, prompts that were under way are answered first.
        again = sorted({c for n, c in self._own(state).items() if n != self.name} - under_way)
        at_most = min(self._horizon - steps, self._in_a_row(state.schedule, self._actors_wanted()))
        number, snapshot = 0, None
        while self._actors.may_begin(state.step, max(int(at_most), 1)):
            if snapshot is None:
                snapshot = self._snapshot(state)
                with shared.lock:
                    shared.newest = snapshot
            own = jax.random.fold_in(key, jax.device_put(np.uint32(Branch.ACTORS + number))) if number else key
            first = again.pop(0) if again else cursor
            cursor += self.config.prompts_per_step * (first == cursor)
            seen = replace(state, train=snapshot, cursors={**state.cursors, self.name: first})
            groups = (self.functions.value_key,) if self.stage(state) else self.functions.groups
            self._actors.begin(state.step, first, self._work(seen, shared, own, groups))
            number += 1
        if snapshot is None and self._compares:
            with shared.lock:
                shared.newest = self._snapshot(state)
        return cursor, again

    def _actors_wanted(self) -> int:
        """The number of actors that may be busy: one until it has compiled the programs that all share."""
        return 1 if self._left is None and len(self._places) == 1 else self._num_actors

    def _snapshot(self, state: RunState) -> TrainState:
        """A copy of what a rollout and its gradient read: an update deletes the original."""
        extra = {n: x for n, x in state.train.extra.items() if n in (self.functions.kl_key, LOSS_SCALE)}
        params = {n: x for n, x in state.train.params.items() if n in self._read}
        return self._copy(TrainState(params, {}, extra))

    def _work(self, seen: RunState, shared: _Shared, key: Array, groups: tuple[str, ...]) -> Work:
        """The work of an actor, from the copy of the parameters to the gradient."""

        def work(actor: int, check: Callable[[], None]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
            place = actor % len(self._places)
            rollouts, clock = self._rollouts[place], Clock()
            here = self._moved(seen, place)
            sample_key, learn_key = jax.random.split(key)
            check()
            answered = rollouts.answer(here, key, sample_key, clock)
            check()
            with shared.lock:  # the order in which statistics of the reward see rollouts is that of arrival
                played = rollouts.weigh(answered, here, shared.reward_state, clock)
                shared.reward_state = played.reward_state
                newest = shared.newest
            train = self._moved(replace(seen, train=newest), place).train if self._compares else here.train
            gradient, metrics = self._gradients[place](
                here.base, train, played.rollout, learn_key, groups=groups
            )
            jax.block_until_ready(gradient)
            check()
            return gradient, metrics, played.metrics

        return work

    def _moved(self, seen: RunState, place: int) -> RunState:
        """The state with its parameters on the device of an actor."""
        if len(self._places) == 1:
            return seen
        references = {name: seen.references[name] for name in self.references}
        moved = jax.device_put((seen.base, seen.train, references), self._places[place])
        return replace(seen, base=moved[0], train=moved[1], references=moved[2])

    def _placed(self, train: TrainState, gradient: Any, metrics: Any) -> tuple[Any, Any]:
        """A gradient and its metrics, lying as the parameters do."""
        if len(self._places) == 1:
            return gradient, metrics
        params = {group: train.params[group] for group in gradient}
        gradient = jax.device_put(gradient, jax.tree.map(lambda x: x.sharding, params))
        return gradient, jax.device_put(metrics, NamedSharding(self._placement.mesh, PartitionSpec()))

    def _counted(self, state: RunState, begun: Begun) -> tuple[np.ndarray, dict[str, float]]:
        """The histogram of staleness with this update, and its metrics: shares of all updates so far."""
        staleness = state.step - begun.version
        counts = state.host[self._counts_key].copy()
        counts[min(staleness, BINS - 1)] += 1
        shares = counts / counts.sum()
        return counts, {"staleness": staleness, **{f"staleness_{n}": float(s) for n, s in enumerate(shares)}}

    def _cursors(self, state: RunState, cursor: int, again: list[int]) -> dict[str, int]:
        """The cursors of the state: of the next prompts, and of each rollout that is under way."""
        others = {n: c for n, c in state.cursors.items() if n not in self._own(state)}
        begun = sorted([begun.cursor for begun in self._actors.under_way] + again)
        under_way = {f"{self.name}/actor_{n}": c for n, c in enumerate(begun)}
        return {**others, self.name: cursor, **under_way}
