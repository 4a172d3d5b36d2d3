"""Metrics on their way to the logs, one step late so that the device never waits for the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from hybrid_jax.training import nonfinite
from hybrid_jax.training.loggers import Logger
from hybrid_jax.training.phase import Metrics
from hybrid_jax.training.progress import Progress


class Recorder:
    """Holds the metrics of the last step until the next one has been started, then fetches and logs them."""

    def __init__(self, logger: Logger, progress: Progress, elapsed: float = 0.0):
        self._logger = logger
        self._progress = progress
        self._pending: tuple[int, str, Metrics] | None = None
        self._params: Mapping[str, Any] = {}
        self._begin = time.monotonic() - elapsed  # so that the clock of a resumed run goes on
        self._stamp = time.monotonic()

    def add(self, step: int, phase: str, metrics: Metrics, params: Mapping[str, Any] | None = None) -> None:
        """Takes the metrics of a step that has been started, and the parameters that come out of it."""
        self._params = params or {}
        self.flush()
        self._pending = (step, phase, metrics)

    def flush(self) -> None:
        """Waits for the pending metrics and logs them; they come to the host here and nowhere else.

        Raises:
            NonFiniteError: the step met a loss, a gradient or a parameter that is not finite.
        """
        if self._pending is None:
            return
        (step, phase, metrics), self._pending = self._pending, None
        numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.monotonic()
        seconds, self._stamp = now - self._stamp, now
        numbers[f"{phase}/seconds"] = seconds
        if tokens := numbers.pop(f"{phase}/tokens", None):
            numbers[f"{phase}/tokens_per_second"] = tokens / max(seconds, 1e-9)
        bad = numbers.pop(f"{phase}/{nonfinite.METRIC}", nonfinite.FINE)
        self._write({"step": step, "phase": phase, "seconds": now - self._begin, **numbers})
        nonfinite.check(step, phase, int(bad), numbers, self._params)

    def evaluation(self, step: int, numbers: dict[str, float], samples: list[dict[str, Any]]) -> None:
        self.flush()
        seconds = time.monotonic() - self._begin
        self._write({"step": step, "phase": "evaluation", "seconds": seconds, **numbers})
        self._logger.samples(samples)
        self._progress.samples(samples)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last step out of the next step's seconds."""
        self._stamp = time.monotonic()

    def close(self, flush: bool = True) -> None:
        """Closes the logs, after the pending metrics unless ``flush`` is false."""
        try:
            if flush:
                self.flush()
        finally:
            # Every record was flushed when it was written; a disk that refused one has been reported then.
            with contextlib.suppress(OSError):
                self._logger.close()
            self._progress.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._logger.metrics(record)
        self._progress.update(record)
