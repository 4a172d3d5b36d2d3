"""Horizons: the planned steps of each phase where they are known, for its learning rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from hybrid_jax.training.optimizers import waits_for_horizon
from hybrid_jax.training.scheduler import Scheduler, planned_steps

log = logging.getLogger(__name__)


def horizons(scheduler: Scheduler, steps: int) -> dict[str, float]:
    """The steps of each phase, at least 1; infinite where the scheduler waits for a metric."""
    planned = planned_steps(scheduler, steps)
    return {name: math.inf if count is None else max(count, 1) for name, count in planned.items()}


def say_what_stays(phases: Mapping[str, Any], planned: Mapping[str, float]) -> None:
    """Names the learning rates that cannot decay, since nobody knows how many steps their phase will get."""
    for name, horizon in planned.items():
        optimizer = phases[name].optimizer
        if waits_for_horizon(optimizer.schedule, horizon):
            log.info(
                "the learning rate of %s stays at %g: a metric decides how many steps the phase gets; "
                "phases.%s.optimizer.schedule.steps=N lets it decay over N of them",
                *(name, optimizer.learning_rate, name),
            )


def tell_rates(
    there: Mapping[str, int | None],
    here: Mapping[str, int | None],
    phases: Mapping[str, Any],
    steps: Mapping[str, int],
) -> None:
    """Says where a schedule of another length changes the learning rate in mid-run; all are by phase.

    A length is None where a metric decides it.
    """
    for name in (name for name in here if name in there):
        rate, done = phases[name].optimizer.rate, steps.get(name, 0)
        horizons = [math.inf if planned is None else max(planned, 1) for planned in (there[name], here[name])]
        before, now = (float(rate(done, horizon)) for horizon in horizons)
        if before != now:
            log.warning(
                "the learning rate of %s goes on at %.3g, not %.3g: its schedule now ends after %s of its "
                "steps instead of %s (by steps or scheduler)",
                *(name, now, before, *("?" if math.isinf(h) else h for h in reversed(horizons))),
            )
