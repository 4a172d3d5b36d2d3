"""Rules for changes between two starts of a run: free, on purpose (``--allow-change``), or refused.

Whatever changes on purpose, and whatever else of a run has become another (`run_contents`), is kept in
``changes.jsonl``: a line ``{"step", "time", "name", "before", "after"}`` each.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.secrets import without_secrets
from hybrid_jax.core.writing import write_text
from hybrid_jax.runs.files import RunFiles
from hybrid_jax.training.checkpoint import saved_steps
from hybrid_jax.training.loggers import read_records, strict

CHANGES_FILE = "changes.jsonl"
# They decide what is written, not what is learnt.
FREE_SETTINGS = (
    *("run_dir", "steps", "evaluation", "checkpoint", "loggers", "compilation_cache"),
    *("peak_tflops", "profile", "mesh"),
)
_FIXED = {  # patterns of names, and why
    r"model(\.(?!execution\.(remat|attention)$).+)?": "it decides what the weights are",
    r"heads(\..+)?": "it decides what the weights are",
    r"tokenizer(\..+)?": "the weights know the tokens of the old one",
    r"start_from": "the run has begun",
    r"seed": "the untrained weights, the order of the rows and all noise come from it",
    r"share_optimizer_state": "the states of the optimizers are kept by it",
    r"phases\.[^.]+(\.name)?": "each phase keeps a state of its own",
    r"phases\.[^.]+\.optimizer\.(name|state_dtype)": "another optimizer cannot go on with its state",
}
_PART = r"phases\.([^.]+)\.reward\.parts\.[^.]+"


@dataclass(frozen=True)
class Change:
    """A setting, or a digest, that is another one than in the checkpoint that a run goes on from."""

    name: str
    before: Any
    after: Any


def changed_settings(
    files: RunFiles,
    settings: dict[str, Any],
    spelled_out: Callable[[dict[str, Any]], dict[str, Any]],
    allow_change: bool = False,
) -> list[Change]:
    """The settings that decide the learning and differ from those of the run in a directory.

    A run that ended before its first checkpoint, by a mistake in its settings perhaps, binds nobody.

    Args:
        files: of the run directory.
        settings: of the experiment that is about to use it.
        spelled_out: adds to written settings the defaults of those that came up since.
        allow_change: whether settings may differ that a run can go on with.

    Raises:
        UserError: it holds a run of other settings.
    """
    path = files.folder / "config.yaml"
    if not saved_steps(files.checkpoints) or not path.is_file():
        return []
    there = spelled_out(load_yaml(path))
    changes = list(differences(there, settings))
    for change in changes:
        reason = why_fixed(change.name, there, settings)
        if reason is None and allow_change:
            continue
        on_purpose = "; give another run_dir, or undo the change to resume" + (
            ", or go on with it by --allow-change (in Python allow_change=True)" if reason is None else ""
        )
        raise UserError(
            f"run_dir {settings['run_dir']} holds a run of another config: {change.name} is "
            f"{change.before!r} there and {change.after!r} here"
            f"{'' if reason is None else f', which cannot change: {reason}'}{on_purpose}"
        )
    return changes


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Change]:
    """The settings that decide what is learnt and differ, each by its dotted name."""
    for name in {**there, **here}:
        if name not in FREE_SETTINGS:
            before, now = (without_secrets(side.get(name), name) for side in (there, here))
            yield from _differences(before, now, name)


def _differences(there: Any, here: Any, name: str) -> Iterator[Change]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}")
    elif there != here and not _is_same_file(there, here):
        yield Change(name, there, here)


def _is_same_file(there: Any, here: Any) -> bool:
    """Tells whether two texts are paths of one file or folder; "/" and "." may be separators."""
    texts = isinstance(there, str) and isinstance(here, str)
    try:
        return texts and all(Path(text).name for text in (there, here)) and os.path.samefile(there, here)
    except (OSError, ValueError):  # one of them is no path here
        return False


def why_fixed(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The reason why a run cannot go on with another value of a setting; None if it can."""
    if part := re.fullmatch(_PART, name):  # one that is new, or gone
        combiners = [s["phases"][part[1]]["reward"]["combine"]["name"] for s in (there, here)]
        return None if combiners == ["weighted_sum"] * 2 else "what the combiner has learnt is of the old parts"
    return next((reason for pattern, reason in _FIXED.items() if re.fullmatch(pattern, name)), None)


def record_changes(folder: Path, step: int, changes: Iterable[Change]) -> None:
    """Adds to the changes of a run those that are not there yet, as after a start that came to nothing."""
    path = folder / CHANGES_FILE
    known = list(read_records(path))
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = [{"step": step, "time": time, **strict(vars(change))} for change in changes]
    last = {line.get("name"): {**line, "time": time} for line in known}
    new = [line for line in new if last.get(line["name"]) != line]
    if new:
        write_text(path, "".join(json.dumps(line) + "\n" for line in (*known, *new)))
