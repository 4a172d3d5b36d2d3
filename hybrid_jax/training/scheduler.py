"""Schedulers choose the phase of every step, on the host, as functions of a `ScheduleState`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from typing import Any, Literal, NoReturn, Protocol

from hybrid_jax.core.ranges import Count, Finite, Natural, Share, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.training.phase import Metrics
from hybrid_jax.training.state import ScheduleState


class Scheduler(Protocol):
    """Chooses which phase takes the next step. It holds settings only; its state is a `ScheduleState`."""

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of all phases that it may choose."""
        ...

    def choose(self, state: ScheduleState) -> str:
        """Returns the name of the phase that takes the next step."""
        ...

    def update(self, state: ScheduleState, phase: str, metrics: Metrics) -> ScheduleState:
        """Returns the state after a step of ``phase``, whose metrics the device may still compute."""
        ...


SCHEDULERS: Registry[Any] = Registry("scheduler", needs=("phases", "choose", "update"))


def planned_steps(scheduler: Scheduler, total: int) -> dict[str, int | None]:
    """Counts how many of ``total`` steps each phase gets, by playing the scheduler through.

    All counts are None where the scheduler looks at metrics, since nobody knows these yet.
    """
    state, metrics = ScheduleState(), _Unknown()
    try:
        for _ in range(total):
            phase = scheduler.choose(state)
            state = scheduler.update(state, phase, metrics)
    except _LookedAt:
        return dict.fromkeys(scheduler.phases)
    return {phase: state.steps.get(phase, 0) for phase in scheduler.phases}


def phase_after(scheduler: Scheduler, state: ScheduleState, phase: str) -> str | None:
    """Finds the phase after one more step of ``phase``; None where the metrics of that step decide."""
    try:
        return scheduler.choose(scheduler.update(state, phase, _Unknown()))
    except _LookedAt:
        return None


def steps_in_a_row(scheduler: Scheduler, state: ScheduleState, at_most: int, phase: str) -> int:
    """Counts the steps that ``phase`` takes one after another, this one among them; at most ``at_most``.

    Where a metric decides, it counts on.
    """
    for count in range(1, at_most):
        try:
            state = scheduler.update(state, phase, _Unknown())
            if scheduler.choose(state) != phase:
                return count
        except _LookedAt:
            break
    return at_most


class _LookedAt(Exception):
    """Raised where a scheduler looks at metrics that are not known yet."""


class _Unknown(Mapping[str, Any]):
    """Metrics that are not known yet: looking at them raises `_LookedAt`."""

    def _look(self, *_: Any) -> NoReturn:
        raise _LookedAt

    def __getitem__(self, name: str) -> Any:
        self._look()

    def __contains__(self, name: object) -> bool:
        self._look()

    def __iter__(self) -> Iterator[str]:
        self._look()

    def __len__(self) -> int:
        self._look()


@SCHEDULERS.register("alternation")
@settings
class Alternation:
    """Takes the steps of ``warmup`` once, then those of ``cycle`` over and over."""

    cycle: Mapping[str, Natural]  # steps of each phase, over and over
    warmup: Mapping[str, Natural] = field(default_factory=dict)  # steps of each phase before the first cycle

    def __post_init__(self):
        if not sum(self.cycle.values()):
            raise ValueError("cycle must hold at least one step")

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of all phases that it may choose."""
        return tuple(name for name, steps in {**self.warmup, **self.cycle}.items() if steps)

    def choose(self, state: ScheduleState) -> str:
        """Returns the name of the phase that takes the next step."""
        position = sum(state.steps.values())
        warmup = sum(self.warmup.values())
        if position < warmup:
            return _at(self.warmup, position)
        return _at(self.cycle, (position - warmup) % sum(self.cycle.values()))

    def update(self, state: ScheduleState, phase: str, metrics: Metrics) -> ScheduleState:
        """Returns the state after a step of ``phase``."""
        return state.after(phase)


class _Share:
    """Gives the second phase a share of the steps: it runs as soon as its share adds up to a whole step."""

    first: str
    second: str

    def share_at(self, state: ScheduleState) -> float:
        """The share of the second phase at this state."""
        raise TypeError("a share scheduler says what the share is")

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of all phases that it may choose."""
        return (self.first, self.second)

    def choose(self, state: ScheduleState) -> str:
        """Returns the name of the phase that takes the next step."""
        # A share such as 0.1 is not a binary fraction: ten of them must still make one step.
        return self.second if state.credit + self.share_at(state) >= 1 - 1e-9 else self.first

    def update(self, state: ScheduleState, phase: str, metrics: Metrics) -> ScheduleState:
        """Returns the state after a step of ``phase``."""
        credit = state.credit + self.share_at(state) - (phase == self.second)
        return replace(state.after(phase), credit=credit)


@SCHEDULERS.register("ratio")
@settings
class Ratio(_Share):
    """Gives the second phase a fixed share of the steps: after n steps it has had ⌊n · share⌋."""

    first: str  # phase that gets the other steps
    second: str  # phase that gets the share
    share: Share  # of the steps that the second phase gets

    def share_at(self, state: ScheduleState) -> float:
        """The share of the second phase at this state."""
        return self.share


@SCHEDULERS.register("curriculum")
@settings
class Curriculum(_Share):
    """Moves the second phase's share from ``start`` to ``end`` between two steps of the run.

    With u = (step - begin_step) / (end_step - begin_step) clipped to [0, 1]: linear is start + u (end - start);
    cosine replaces u by (1 - cos πu) / 2; step jumps at ``end_step``.
    """

    first: str  # phase that gets the other steps
    second: str  # phase that gets the share
    end_step: Count  # step of the run at which the share reaches end
    begin_step: Natural = 0  # step of the run up to which it stays at start
    start: Share = 0.1  # share of the second phase at first
    end: Share = 0.9  # share of the second phase at last
    shape: Literal["linear", "cosine", "step"] = "linear"  # course between the two

    def __post_init__(self):
        if self.end_step <= self.begin_step:
            raise ValueError(f"end_step must be greater than begin_step {self.begin_step}, got {self.end_step}")

    def share_at(self, state: ScheduleState) -> float:
        """The share of the second phase at this state."""
        step = sum(state.steps.values())
        done = min(max((step - self.begin_step) / (self.end_step - self.begin_step), 0.0), 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif self.shape == "step":
            done = math.floor(done)
        return self.start + done * (self.end - self.start)


@SCHEDULERS.register("triggered")
@settings
class Triggered(_Share):
    """Changes the second phase's share from ``before`` to ``after`` once a metric has crossed a threshold.

    Each step that logs the metric waits for its value; a step of another phase does not.
    """

    first: str  # phase that gets the other steps
    second: str  # phase that gets the share
    metric: str  # that is watched, as it is logged: <phase>/loss
    below: Finite | None = None  # value that it must fall below
    above: Finite | None = None  # value that it must rise above, instead of below
    before: Share = 0.0  # share of the second phase until then
    after: Share = 0.5  # share of the second phase from then on

    def __post_init__(self):
        if (self.below is None) == (self.above is None):
            raise ValueError("below or above must be given, and only one of them")

    def share_at(self, state: ScheduleState) -> float:
        """The share of the second phase at this state."""
        return self.after if state.triggered else self.before

    def update(self, state: ScheduleState, phase: str, metrics: Metrics) -> ScheduleState:
        """Returns the state after a step of ``phase``."""
        state = super().update(state, phase, metrics)
        if state.triggered or self.metric not in metrics:
            return state
        value = float(metrics[self.metric])
        crossed = value < self.below if self.below is not None else value > (self.above or 0.0)
        return replace(state, triggered=crossed)


def _at(steps: Mapping[str, int], position: int) -> str:
    for phase, count in steps.items():
        if position < count:
            return phase
        position -= count
    raise IndexError(position)
