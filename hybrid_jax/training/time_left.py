"""Estimates the time that a run still takes from what its phases and evaluations have cost so far."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Protocol

from hybrid_jax.training.phase import Phase
from hybrid_jax.training.scheduler import Scheduler
from hybrid_jax.training.state import RunState

EVALUATION = "evaluation"
_RECENT = 50  # the newest steps of each phase that its mean is taken over


class TimeLeft:
    """Estimates the seconds that are left, without those of compiling.

    Every phase has its own mean, over its newest steps in which nothing was compiled. Where a phase has no such
    step, its cost is guessed from that of the others by ``costs``. Evaluations count as one more phase.

    Args:
        plan: what is still to come, by name: a phase for each step, "evaluation" for each evaluation.
        costs: the relative cost of a step of each phase, for phases where it is known.
    """

    def __init__(self, plan: Iterable[str] = (), costs: Mapping[str, float] | None = None):
        self._left = Counter(plan)
        self._costs = costs or {}
        self._is_planned = bool(self._left)
        self._seconds: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}  # seconds of what has run only once, together with its compilation
        self._recent: deque[str] = deque(maxlen=2 * _RECENT)

    def took(self, name: str, seconds: float, compiling: float = 0.0) -> None:
        """Takes the seconds of one step of a phase, or of one evaluation.

        Args:
            name: the name of the phase, or "evaluation".
            seconds: the whole time.
            compiling: the part of it that was spent on compiling.
        """
        if compiling:
            self._first[name] = max(seconds - compiling, 0.0)
        else:
            self._seconds.setdefault(name, deque(maxlen=_RECENT)).append(seconds)
        if name != EVALUATION:
            self._recent.append(name)
            # A scheduler that waits for a metric leaves the plan: then the last steps stand for the next ones.
            self._is_planned = self._is_planned and self._left[name] > 0
        self._left[name] -= 1

    def seconds(self, steps: int) -> float | None:
        """Estimates the seconds of the remaining ``steps`` and evaluations; None before any measurement."""
        if not any(name in self._seconds for name in self._recent):
            return None
        left = {name: count for name, count in self._left.items() if count > 0}
        if not self._is_planned:
            shares = Counter(self._recent)
            left = {name: steps * count / len(self._recent) for name, count in shares.items()}
            left[EVALUATION] = max(self._left[EVALUATION], 0)
        return sum(count * self._cost(name) for name, count in left.items())

    @property
    def is_guess(self) -> bool:
        """Tells whether some phase that is still to come has not been measured yet."""
        return any(n > 0 and name not in self._seconds for name, n in self._left.items() if name != EVALUATION)

    def _cost(self, name: str) -> float:
        if name in self._seconds:
            return fmean(self._seconds[name])
        if name == EVALUATION:
            return self._first.get(name, 0.0)
        means = {phase: fmean(known) for phase, known in self._seconds.items() if phase != EVALUATION}
        known = {phase: mean for phase, mean in means.items() if phase in self._costs}
        if name in self._costs and known:
            return self._costs[name] * sum(known.values()) / sum(self._costs[phase] for phase in known)
        return fmean(means.values())


class Ahead(Protocol):
    """The facts that decide the rest of a run."""

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Chooses the phase of every step."""
        ...

    def evaluation_is_due(self, state: RunState, next_phase: str) -> bool:
        """Tells whether there is an evaluation before the next step."""
        ...


def steps_ahead(run: Ahead, state: RunState) -> Iterator[str]:
    """Yields what is still to come: the phase of each step, and "evaluation" where there is one.

    Assumes that a scheduler which waits for a metric never sees it.
    """
    while True:
        phase = run.scheduler.choose(state.schedule)
        if run.evaluation_is_due(state, phase):
            yield EVALUATION
        if state.step >= run.steps:
            return
        yield phase
        try:
            schedule = run.scheduler.update(state.schedule, phase, {})
        except KeyError:  # the scheduler needs a metric: then there is no plan
            return
        state = replace(state, step=state.step + 1, schedule=schedule)


def relative_costs(phases: Mapping[str, Phase], state: RunState) -> dict[str, float]:
    """Counts the tokens of a step of each phase: read or sampled once, learned from three times.

    For the gradient of a product is two more products. The counts compare phases before they have run;
    what their steps cost on the device at hand is known only later.

    Args:
        phases: by name, built with their data.
        state: shapes of the whole state.
    """
    costs = {}
    for name, phase in phases.items():
        try:
            programs = phase.programs(state)
        except Exception:  # a phase from outside may fail here, and an estimate must not end a run
            continue
        costs[name] = float(sum((3 if program.learns else 1) * program.tokens for program in programs))
    return {name: tokens for name, tokens in costs.items() if tokens}
