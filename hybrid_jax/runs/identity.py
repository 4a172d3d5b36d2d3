"""Says which run a directory belongs to, and with what it was made."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel import hosts
from hybrid_jax.runs.changes import CHANGES_FILE
from hybrid_jax.runs.files import CHECKPOINTS, EARLIER, RunFiles
from hybrid_jax.training.checkpoint import saved_steps
from hybrid_jax.training.loggers import METRICS_FILE, SAMPLES_FILE, read_records

log = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
# What a training writes beside its checkpoints.
WRITTEN = (
    *("config.yaml", ENVIRONMENT, CHANGES_FILE, METRICS_FILE, SAMPLES_FILE, "report.html", "wandb_run_id"),
    *("tokenizer", "tensorboard", "wandb", "profile", "exports", "model", "heads"),
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
    """Checks that the run directory is ours and holds its lock during a training.

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
