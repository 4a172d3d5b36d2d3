"""The origin of a run: its newest checkpoint, a checkpoint of another run (``start_from``), or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import is_url, load_yaml
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.base import Params
from hybrid_jax.runs.changes import Change, changed_settings, differences, why_fixed
from hybrid_jax.runs.contents import changed
from hybrid_jax.runs.files import RunFiles, fetched
from hybrid_jax.runs.saved_tokenizer import saved_tokenizer
from hybrid_jax.training.checkpoint import Checkpoints, saved_progress, saved_steps
from hybrid_jax.training.horizons import tell_rates
from hybrid_jax.training.state import RunState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The state that a run begins or goes on with.

    Attributes:
        state: fresh, or out of a checkpoint.
        note: what that checkpoint says beside the state (its ``note``); None without one.
        is_own: whether the checkpoint is the run's own.
    """

    state: RunState
    note: Mapping[str, Any] | None = None
    is_own: bool = False

    @property
    def is_branch(self) -> bool:
        """Tells whether the checkpoint is another run's."""
        return self.note is not None and not self.is_own


def find_origin(
    files: RunFiles, checkpoints: Checkpoints, fresh: RunState, reference: Params, start_from: str | None
) -> Origin:
    """The newest checkpoint of a run, else that of ``start_from``, else the fresh state."""
    if (state := checkpoints.newest(fresh, reference)) is not None:
        return Origin(state, _note(files.checkpoints, state.step), is_own=True)
    if start_from is None:
        return Origin(fresh)
    run, step = split(start_from)
    there = fetched(run).checkpoints
    state = Checkpoints(there, keep=1).newest(fresh, reference, step)
    assert state is not None, "`pinned` has found it"
    return Origin(state, _note(there, state.step))


def split(start_from: str) -> tuple[str, int | None]:
    """The run and the step of ``RUN@step`` or ``RUN``."""
    run, at, step = start_from.rpartition("@")
    return (run, int(step)) if at and step.isdecimal() else (start_from, None)


def pinned(start_from: str | None, files: RunFiles) -> str | None:
    """``start_from`` with its step: that of the run itself once it has begun, else the newest that is kept.

    Raises:
        UserError: there is no such run, or it keeps no checkpoint of that step.
    """
    if start_from is None:
        return None
    if not is_url(files.name) and Path(split(start_from)[0]).resolve() == files.folder.resolve():
        raise UserError(f"start_from must be another run than run_dir, got {start_from!r} for both")
    if saved_steps(files.checkpoints):
        there = load_yaml(files.folder / "config.yaml").get("start_from")
        return there if there is not None and split(there)[0] == start_from else start_from
    run, step = split(start_from)
    kept = saved_steps(fetched(run).checkpoints)
    if not kept:
        raise UserError(f"start_from must be a run with a checkpoint, or RUN@step, got {start_from!r}")
    if step is not None and step not in kept:
        others = ", ".join(map(str, sorted(kept)))
        raise UserError(f"start_from: {run} keeps no checkpoint of step {step}; those that it keeps: {others}")
    return f"{run}@{kept[0] if step is None else step}"


def changes_since(
    files: RunFiles,
    start_from: str | None,
    settings: dict[str, Any],
    spelled_out: Callable[[dict[str, Any]], dict[str, Any]],
    allow_change: bool,
) -> list[Change]:
    """The settings that differ from those of the checkpoint that a run goes on from; see `changed_settings`.

    Raises:
        UserError: it could not go on from there, or was not told to.
    """
    if start_from is None or saved_steps(files.checkpoints):
        return changed_settings(files, settings, spelled_out, allow_change)
    run = split(start_from)[0]
    there = spelled_out(load_yaml(fetched(run).folder / "config.yaml"))
    changes = [change for change in differences(there, settings) if change.name != "start_from"]
    for change in changes:
        if change.name != "seed" and (reason := why_fixed(change.name, there, settings)):
            raise UserError(
                f"start_from: {change.name} is {change.before!r} in {run} and {change.after!r} here, which "
                f"cannot change: {reason}; undo the change, or export the weights alone for a new run"
            )
    return [Change("start_from", None, start_from), *changes]


def known_tokenizer(files: RunFiles, start_from: str | None) -> Tokenizer | None:
    """The tokenizer that the weights know; None of a run that begins."""
    if start_from is not None and not saved_steps(files.checkpoints):
        files = fetched(split(start_from)[0])
    begun = saved_steps(files.checkpoints) and (files.folder / "tokenizer").is_dir()
    return saved_tokenizer(files) if begun else None


def tell_origin(
    origin: Origin, note: Mapping[str, Any], changes: list[Change], config: Any, run_dir: str
) -> list[Change]:
    """Says where a run goes on from, and what has changed since; returns all changes.

    Args:
        origin: that state, and the note of its checkpoint.
        note: what the run writes into its own: ``contents`` and, by phase, the steps planned, ``horizons``.
        changes: of its settings.
        config: of the experiment.
        run_dir: its name.

    Raises:
        UserError: the tokenizer is another one.
    """
    state, there = origin.state, origin.note
    if there is None:
        return []
    if origin.is_own:
        log.info("resumed %s at step %d of %d", run_dir, state.step, config.steps)
    else:
        log.info(
            "starts from %s: weights, optimizer states, references, what rewards and controllers have learnt, "
            "the place in the data and the schedule are taken over; metrics and samples stay there",
            config.start_from,
        )
    for change in changes:
        if change.name != "start_from":
            log.info("from step %d on %s is %r, not %r", state.step, change.name, change.after, change.before)
    if state.step > config.steps:
        log.warning("%d steps are taken already, so steps=%d trains no more", state.step, config.steps)
    else:
        planned = there.get("horizons", {}), note["horizons"]
        tell_rates(*planned, config.phases, state.schedule.steps)
    return [*changes, *changed(there.get("contents", {}), note["contents"], state.step)]


def _note(checkpoints: Any, step: int) -> dict[str, Any]:
    """The note that a run kept in a checkpoint; empty before version 0.4.1."""
    return saved_progress(checkpoints, step).get("note", {})
