"""Runs the training loop, which knows nothing of phases but that they take steps."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from hybrid_jax.core.waiting import Stopped
from hybrid_jax.parallel import hosts
from hybrid_jax.training import out_of_memory
from hybrid_jax.training.checkpoint import CheckpointConfig, Checkpoints
from hybrid_jax.training.compilation import free_programs
from hybrid_jax.training.interrupts import Interrupted, Interrupts, leaving_in_order
from hybrid_jax.training.nonfinite import NonFiniteError
from hybrid_jax.training.offload import Idle, placed_for, with_idle, without_idle
from hybrid_jax.training.phase import Phase, StagedPhase
from hybrid_jax.training.recorder import Recorder
from hybrid_jax.training.scheduler import Scheduler
from hybrid_jax.training.state import RunState

log = logging.getLogger(__name__)


class Run(Protocol):
    """The side of an experiment that the loop uses."""

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        ...

    @property
    def key(self) -> Array:
        """The root of all randomness in training."""
        ...

    @property
    def phases(self) -> Mapping[str, Phase]:
        """The phases by their names in the config."""
        ...

    @property
    def scheduler(self) -> Scheduler:
        """Chooses the phase of every step."""
        ...

    @property
    def checkpoint(self) -> CheckpointConfig:
        """The settings that say when the state is saved and exported."""
        ...

    @property
    def offload(self) -> Sequence[Idle]:
        """Names what waits in the host's memory while no phase uses it."""
        ...

    def owned(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run directory during a training, so that nobody else writes it."""
        ...

    def open(self) -> tuple[RunState, Checkpoints, Recorder]:
        """Returns the newest saved state, or a fresh one, with the writers of the run directory."""
        ...

    def evaluate(
        self, state: RunState
    ) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """Returns numbers, samples to show, and for some of the numbers the values of each held-out prompt."""
        ...

    def evaluation_is_due(self, state: RunState, next_phase: str) -> bool:
        """Tells whether the state is to be evaluated before the next step."""
        ...

    def observe(self, state: RunState, numbers: Mapping[str, float]) -> RunState:
        """Updates whatever learns from the numbers of an evaluation."""
        ...

    def export(self, state: RunState, folder: Path | None = None) -> Path:
        """Writes the trained model for other programs, and returns its folder."""
        ...

    def finish(self, state: RunState) -> None:
        """Writes what a finished run leaves behind."""
        ...


def train(run: Run) -> RunState:
    """Trains to the last step and returns the final state; the same call resumes what is in the run directory.

    A step that fails leaves the state before it saved, so that a rerun repeats that step and none before.

    Raises:
        NonFiniteError: a loss, gradient or parameter is not finite. The newest checkpoint is from before.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the state was saved first.
        KeyboardInterrupt: a second Ctrl-C came; nothing more was saved.
        UserError: another process trains in the run directory.
    """
    with run.owned():
        state = _train(run)
        with leaving_in_order():
            run.finish(state)
    return state


def _train(run: Run) -> RunState:
    with leaving_in_order():
        state, checkpoints, recorder = run.open()
    saved, aborted = state.step, False
    with Interrupts() as interrupts:
        try:
            while True:
                checkpoints.check()
                phase = run.phases[run.scheduler.choose(state.schedule)]
                finished = state.step >= run.steps
                stop = interrupts.agreed()
                leaving = finished or stop is not None
                if state.step > saved and (leaving or state.step % run.checkpoint.every == 0):
                    saved = state.step
                    with recorder.between_steps("checkpoint"):
                        checkpoints.save(state)
                if stop is not None:
                    checkpoints.wait()
                    _say_stopped(state)
                    raise Interrupted(stop)
                _export_if_due(run, state)
                # What is saved is always the state before the evaluation: a rerun evaluates and observes again.
                begun = state
                if run.evaluation_is_due(state, phase.name):
                    with recorder.between_steps("evaluation"), out_of_memory.explained("evaluation"):
                        found = run.evaluate(state)
                    recorder.evaluation(state.step, *found)
                    if interrupts.agreed() is not None:
                        continue
                    if not finished:
                        begun = run.observe(state, found[0])
                if finished:
                    break
                if phase.waits_for_device:
                    recorder.flush()
                state = take_step(run, phase, begun, recorder)
        except Stopped:  # while a reward waited for the network; the state before the step is complete
            if state.step == saved or _save_before_leaving(state, checkpoints, recorder):
                checkpoints.wait()
                _say_stopped(state)
            raise Interrupted(interrupts.number or signal.SIGINT) from None
        except KeyboardInterrupt:  # a second Ctrl-C: wait neither for the device nor for a save
            aborted = True
            raise
        except NonFiniteError:  # the state after the step is worthless; a rerun repeats the step
            raise
        except Exception:
            if state.step > saved and hosts.size() == 1:  # of several, the others may not have failed
                _save_before_leaving(state, checkpoints, recorder)
            raise
        finally:
            try:
                recorder.close(flush=not aborted)
            finally:
                if not aborted:
                    checkpoints.close()
    return state


def take_step(run: Run, phase: Phase, state: RunState, recorder: Recorder | None = None) -> RunState:
    """Takes one step of ``phase`` with its own randomness, counts and records it."""
    free_programs()  # prompts of new lengths keep compiling new programs
    number = jax.device_put(np.uint32(state.step))  # an explicit transfer, the only kind in a step
    stage = phase.stage(state) if isinstance(phase, StagedPhase) else ""
    started = (
        contextlib.nullcontext()
        if recorder is None
        else recorder.step(state.step, phase.name, getattr(phase, "shapes_setting", None), stage)
    )
    with started, out_of_memory.explained(phase.name):
        state, idle = without_idle(placed_for(state, phase, run.offload), phase)
        new, metrics = phase.step(state, jax.random.fold_in(run.key, number))
    new = with_idle(new, idle)
    schedule = run.scheduler.update(state.schedule, phase.name, metrics)
    if recorder is not None:
        recorder.add(state.step, phase.name, phase.kind, metrics, new.train.params)
    return dataclasses.replace(new, step=state.step + 1, schedule=schedule)


def _export_if_due(run: Run, state: RunState) -> None:
    every = run.checkpoint.export_every
    if every is not None and state.step and (state.step % every == 0 or state.step >= run.steps):
        run.export(state)


def _say_stopped(state: RunState) -> None:
    done = "saved; the same command goes on" if state.step else "nothing to save yet"
    log.info("stopped at step %d: %s", state.step, done)


def _save_before_leaving(state: RunState, checkpoints: Checkpoints, recorder: Recorder) -> bool:
    """Saves the state before a failed step and returns whether it could: the step may have consumed that state.

    Whatever goes wrong here is only reported, since the error of the step itself must reach the user.
    """
    arrays = (leaf for leaf in jax.tree.leaves(state.train) if isinstance(leaf, jax.Array))
    if any(array.is_deleted() for array in arrays):
        return False
    try:
        recorder.flush()
        checkpoints.save(state)
        checkpoints.wait()
    except Exception as error:
        log.warning("the state after %d steps could not be saved: %s", state.step, error)
        return False
    log.info("saved the state after %d steps", state.step)
    return True
