"""Traces a few steps for the profile view of TensorBoard or XProf."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

from hybrid_jax.core.ranges import Count, Natural, settings

log = logging.getLogger(__name__)


@settings
class ProfileConfig:
    """The steps to trace."""

    start: Natural = 10  # first step to trace, counted from 0; the first steps of a phase compile
    steps: Count = 3  # how many steps to trace


class Profiler:
    """Marks every step for any profiler that listens, and writes the trace that the config asks for."""

    def __init__(self, config: ProfileConfig | None = None, folder: Path | None = None):
        self._config, self._folder = config, folder
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, number: int, phase: str) -> Iterator[None]:
        """Wraps what starts a step."""
        if self._config is not None and number == self._config.start:
            jax.profiler.start_trace(str(self._folder))
            self._is_tracing = True
        with jax.profiler.StepTraceAnnotation(phase, step_num=number):
            yield

    def finished(self, number: int) -> None:
        """Notes that the device has finished a step; ends the trace after its last one."""
        if self._config is not None and number >= self._config.start + self._config.steps - 1:
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running, and writes it."""
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            log.info("wrote a profile to %s", self._folder)
