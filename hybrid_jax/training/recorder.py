"""Writes metrics to the logs, one step late, so that the device never waits for the host."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from hybrid_jax.training import nonfinite, out_of_memory
from hybrid_jax.training.compilation import Compilations, summary
from hybrid_jax.training.loggers import BY_PROMPT, Logger
from hybrid_jax.training.machine import Machine
from hybrid_jax.training.phase import Metrics
from hybrid_jax.training.profiler import Profiler
from hybrid_jax.training.progress import Progress
from hybrid_jax.training.time_left import EVALUATION

log = logging.getLogger(__name__)

# Seconds that a phase may log of its own step; in the rest of the step the device finishes the updates.
PARTS = ("input_seconds", "rollout_seconds", "reward_seconds", "score_seconds")


class Recorder:
    """Holds the metrics of the last step until the next one has been started, then fetches and logs them.

    Args:
        logger: receives the records.
        progress: shows them.
        elapsed: seconds of the run in earlier processes.
        machine: adds memory, compilations and utilisation to the records.
        profiler: marks the steps.
    """

    def __init__(
        self,
        logger: Logger,
        progress: Progress,
        elapsed: float = 0.0,
        machine: Machine | None = None,
        profiler: Profiler | None = None,
    ):
        self._logger = logger
        self._progress = progress
        self._machine = machine
        self._profiler = profiler or Profiler()
        self._compilations = Compilations()
        self._since_stamp = Compilations()
        self._started: set[str] = set()  # phases, their stages and the evaluation, once they have run here
        self._pending: tuple[int, str, str, Metrics] | None = None
        self._params: Mapping[str, Any] = {}
        self._between: dict[str, float] = {}  # seconds spent between two steps, for the next record
        self._begin = time.monotonic() - elapsed  # so that the clock of a resumed run goes on
        self._stamp = time.monotonic()

    @contextlib.contextmanager
    def step(self, step: int, phase: str, shapes_setting: str | None = None, stage: str = "") -> Iterator[None]:
        """Wraps the start of a step: marks it for a profiler, and warns where it compiles again.

        Args:
            step: its number.
            phase: the name of the phase that takes it.
            shapes_setting: the setting that decides the shapes, named by a warning about new ones.
            stage: the stage that the phase is in; each compiles programs of its own.
        """
        name = f"{phase} ({stage})" if stage else phase
        is_first = name not in self._started
        self._compilations.new()
        with self._profiler.step(step, phase), self._first_time(name, "step"):
            yield
        compiled = self._compilations.new()
        if compiled and not is_first:
            hint = "" if shapes_setting is None else f"; see {shapes_setting}"
            log.warning("step %d: %s met new shapes and compiled %s%s", step, phase, summary(compiled), hint)

    @contextlib.contextmanager
    def _first_time(self, name: str, what: str) -> Iterator[None]:
        """Announces code that compiles when it first runs, and logs how long that took."""
        if name in self._started:
            yield
            return
        self._started.add(name)
        log.info("compiling %s … (first %s)", name, what)
        self._progress.busy(f"compiling {name}")
        compilations, started = Compilations(), time.monotonic()
        yield
        seconds = time.monotonic() - started
        log.info("compiled %s in %.1f s (its first %s took %.1f s)", name, compilations.seconds, what, seconds)

    def add(
        self,
        step: int,
        phase: str,
        kind: str,
        metrics: Metrics,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes the metrics of a step that has been started.

        Args:
            step: its number.
            phase: the name of the phase in the config.
            kind: the kind of the phase.
            metrics: by name; the device may still be computing them.
            params: parameters after the step, searched where a number is not finite.
        """
        self._params = params or {}
        self.flush()
        self._pending = (step, phase, kind, metrics)

    def flush(self) -> None:
        """Waits for the pending metrics and logs them; only here are they copied to the host.

        Raises:
            NonFiniteError: the step met a loss, a gradient or a parameter that is not finite.
        """
        if self._pending is None:
            return
        (step, phase, kind, metrics), self._pending = self._pending, None
        with out_of_memory.explained(phase):  # a step that was only started may fail here
            numbers = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._profiler.finished(step)
        seconds, compiling = self._lap()
        now = self._stamp
        self._progress.time_left.took(phase, seconds, compiling)
        bad = numbers.pop(f"{phase}/{nonfinite.METRIC}", nonfinite.FINE)
        numbers |= self._speed(phase, numbers, seconds)
        record = {"step": step, "phase": phase, "kind": kind, "seconds": now - self._begin}
        self._write(record | numbers)
        nonfinite.check(step, phase, int(bad), numbers, self._params)

    @contextlib.contextmanager
    def between_steps(self, name: str) -> Iterator[None]:
        """Wraps what is done between two steps, so that its seconds do not count as a step's.

        The next record, which may be that of an evaluation, holds them as ``time/<name>_seconds``.
        """
        self.flush()
        self._lap()
        compiles = name == EVALUATION
        try:
            with self._first_time(name, "time") if compiles else contextlib.nullcontext():
                yield
        finally:
            seconds, compiling = self._lap()
            self._between[f"time/{name}_seconds"] = seconds
            if compiles:
                self._progress.time_left.took(name, seconds, compiling)

    def evaluation(
        self,
        step: int,
        numbers: dict[str, float],
        samples: list[dict[str, Any]],
        by_prompt: dict[str, list[float]] | None = None,
    ) -> None:
        """Logs an evaluation; ``by_prompt`` holds values behind some of its means, for paired comparisons."""
        self.flush()
        seconds = time.monotonic() - self._begin
        record = {"step": step, "phase": EVALUATION, "kind": EVALUATION, "seconds": seconds, **numbers}
        self._write(record | ({BY_PROMPT: by_prompt} if by_prompt else {}))
        self._logger.samples(samples)
        self._progress.samples(samples)
        self._lap()

    def _lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them were spent on compiling."""
        now = time.monotonic()
        seconds, self._stamp = now - self._stamp, now
        return seconds, sum(program.seconds for program in self._since_stamp.new())

    def close(self, flush: bool = True) -> None:
        """Closes the logs, after the pending metrics unless ``flush`` is false."""
        try:
            if flush:
                self.flush()
        finally:
            self._profiler.close()
            # Every record was flushed when it was written; a disk that refused one has been reported then.
            with contextlib.suppress(OSError):
                self._logger.close()
            self._progress.close()

    def _speed(self, phase: str, numbers: dict[str, float], seconds: float) -> dict[str, float]:
        """Computes where the seconds of a step went, and its speed; takes ``tokens`` and ``flops`` out."""
        speed = {f"{phase}/seconds": seconds}
        seconds = max(seconds, 1e-9)
        parts = [numbers[f"{phase}/{part}"] for part in PARTS if f"{phase}/{part}" in numbers]
        if parts:
            speed[f"{phase}/update_seconds"] = max(seconds - sum(parts), 0.0)
        if tokens := numbers.pop(f"{phase}/tokens", None):
            speed[f"{phase}/tokens_per_second"] = tokens / seconds
        flops = numbers.pop(f"{phase}/flops", None)
        if self._machine is not None:
            mfu = None if flops is None else self._machine.utilisation(flops, seconds)
            speed |= {} if mfu is None else {f"{phase}/mfu": mfu}
            speed |= self._machine.numbers()
        return speed

    def _write(self, record: dict[str, Any]) -> None:
        record, self._between = {**record, **self._between}, {}
        self._logger.metrics(record)
        self._progress.update(record)
