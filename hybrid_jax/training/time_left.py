"""An estimate of the time that a run still takes, from the cost of its phases and evaluations so far."""

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

    Every phase has its own mean, over its newest steps in which nothing was compiled. A phase without such a
    step is guessed from the others by its ``work``. Evaluations are counted as one more phase.

    Args:
        plan: what is still to come, by name: a phase for each step, "evaluation" for each evaluation.
        work: the relative cost of a step of each phase, as far as it is known.
    """

    def __init__(self, plan: Iterable[str] = (), work: Mapping[str, float] | None = None):
        self._left = Counter(plan)
        self._work = work or {}
        self._is_planned = bool(self._left)
        self._seconds: dict[str, deque[float]] = {}
        self._first: dict[str, float] = {}  # of what has only been seen together with its compilation
        self._recent: deque[str] = deque(maxlen=2 * _RECENT)

    def took(self, name: str, seconds: float, compiling: float = 0.0) -> None:
        """Takes what one step of a phase, or one evaluation, has cost.

        Args:
            name: of the phase, or "evaluation".
            seconds: all of them.
            compiling: how many of them were spent on compiling.
        """
        if compiling:
            self._first[name] = max(seconds - compiling, 0.0)
        else:
            self._seconds.setdefault(name, deque(maxlen=_RECENT)).append(seconds)
        if name != EVALUATION:
            self._recent.append(name)
            # A scheduler that waits for a metric leaves the plan: from then on the newest steps are the plan.
            self._is_planned = self._is_planned and self._left[name] > 0
        self._left[name] -= 1

    def seconds(self, steps: int) -> float | None:
        """Estimates the seconds of the last ``steps`` with their evaluations; None before any measurement."""
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
        """Whether some phase that is still to come has not been measured yet."""
        return any(n > 0 and name not in self._seconds for name, n in self._left.items() if name != EVALUATION)

    def _cost(self, name: str) -> float:
        if name in self._seconds:
            return fmean(self._seconds[name])
        if name == EVALUATION:
            return self._first.get(name, 0.0)
        means = {phase: fmean(known) for phase, known in self._seconds.items() if phase != EVALUATION}
        worked = {phase: mean for phase, mean in means.items() if phase in self._work}
        if name in self._work and worked:
            return self._work[name] * sum(worked.values()) / sum(self._work[phase] for phase in worked)
        return fmean(means.values())


class Ahead(Protocol):
    """The settings that decide the rest of a run."""

    @property
    def steps(self) -> int: ...

    @property
    def scheduler(self) -> Scheduler: ...

    def evaluation_is_due(self, state: RunState, next_phase: str) -> bool: ...


def steps_ahead(run: Ahead, state: RunState) -> Iterator[str]:
    """Yields what is still to come: the phase of each step, and "evaluation" where there is one.

    A scheduler that waits for a metric is taken never to see it.
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
        except KeyError:  # it cannot do without: then there is no plan
            return
        state = replace(state, step=state.step + 1, schedule=schedule)


def relative_work(phases: Mapping[str, Phase], state: RunState) -> dict[str, float]:
    """Tokens that a step of each phase reads or samples, those that it learns from three times.

    The gradient of a product is two products. This compares phases that have not run yet; what their steps cost
    on the device at hand is known only after that.

    Args:
        phases: by name, built with their data.
        state: the shapes of the whole state.
    """
    work = {}
    for name, phase in phases.items():
        try:
            programs = phase.programs(state)
        except Exception:  # a phase from outside may not say; an estimate must not end a run
            continue
        work[name] = float(sum((3 if program.learns else 1) * program.tokens for program in programs))
    return {name: tokens for name, tokens in work.items() if tokens}
