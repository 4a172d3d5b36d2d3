"""Which run a directory belongs to, and what it was made with."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.registry import UserError
from hybrid_jax.core.secrets import without_secrets
from hybrid_jax.parallel import hosts
from hybrid_jax.training.checkpoint import saved_steps
from hybrid_jax.training.loggers import METRICS_FILE, SAMPLES_FILE, read_records
from hybrid_jax.training.run_files import CHECKPOINTS, EARLIER, RunFiles

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
# What a training writes beside its checkpoints.
WRITTEN = (
    *("config.yaml", ENVIRONMENT, METRICS_FILE, SAMPLES_FILE, "report.html", "wandb_run_id"),
    *("tokenizer", "tensorboard", "wandb", "profile", "exports", "model"),
)
# Settings that may change between two starts of one run: they decide what is written, not what is learnt.
FREE_SETTINGS = (
    *("run_dir", "steps", "evaluation", "checkpoint", "loggers", "compilation_cache"),
    *("peak_tflops", "profile", "mesh"),
)


def environment() -> dict[str, Any]:
    """Versions, devices and the commit, for the record."""
    from importlib.metadata import version

    packages = ("hybrid_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
    return {
        "python": platform.python_version(),
        "platform": platform.system() + " " + platform.machine(),
        "cpu_count": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


@contextlib.contextmanager
def owned(files: RunFiles) -> Iterator[None]:
    """Around a training: the run directory is ours, and nobody else writes it meanwhile.

    Raises:
        UserError: it holds something that is no run of ours, or another process trains there.
    """
    if hosts.is_first():
        check_is_run(files)
    with files.owned():
        yield


def check_is_run(files: RunFiles) -> None:
    """A training may overwrite what it writes itself: so its directory is a new one, an empty one, or a run.

    A run is known by the ``environment.json`` that every version has written at its start, or by a config with
    checkpoints beside it.

    Raises:
        UserError: it is none of these.
    """
    names = [name for name in files.names() if not re.fullmatch(rf"{EARLIER}\d+", name)]
    if not names or _says_that_it_is_ours(files.read(ENVIRONMENT) if ENVIRONMENT in names else None):
        return
    if {"config.yaml", CHECKPOINTS} <= set(names) and saved_steps(files.checkpoints):
        return
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(
        f"run_dir {files.name} is not empty and no run of ours: it holds {', '.join(names[:3])}{others}; "
        "give a new or an empty folder"
    )


def _says_that_it_is_ours(environment: str | None) -> bool:
    try:
        return "hybrid_jax" in json.loads(environment or "{}")["packages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def keep_earlier(files: RunFiles) -> None:
    """Makes room for a new run where one has trained whose checkpoints are gone; the folder must be `owned`."""
    if all(record.get("phase") == "evaluation" for record in read_records(files.folder / METRICS_FILE)):
        files.remove("tokenizer")  # of a start that came to nothing
        return
    aside = files.set_aside(WRITTEN)
    log.warning(
        "run_dir %s holds the records of a run but no checkpoint to go on from: they are kept in %s, and "
        "training starts at step 0",
        *(files.name, aside),
    )


def check_same_run(
    files: RunFiles, settings: dict[str, Any], spelled_out: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """A run directory belongs to one experiment: what decides the learning must be the same.

    A run that ended before its first checkpoint, by a mistake in its settings perhaps, binds nobody.

    Args:
        files: of the run directory.
        settings: of the experiment that is about to use it.
        spelled_out: adds to written settings the defaults of those that came up since.

    Raises:
        UserError: it holds a run of other settings.
    """
    path = files.folder / "config.yaml"
    if not saved_steps(files.checkpoints) or not path.is_file():
        return
    there, here = _fixed(spelled_out(load_yaml(path))), _fixed(settings)
    if difference := next(_differences(there, here), None):
        name, before, now = difference
        raise UserError(
            f"run_dir {settings['run_dir']} holds a run of another config: {name} is {before!r} there and "
            f"{now!r} here; give another run_dir, or undo the change to resume"
        )


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    return without_secrets({name: value for name, value in settings.items() if name not in FREE_SETTINGS})


def _differences(there: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    elif there != here:
        yield path, there, here
