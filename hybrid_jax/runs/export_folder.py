"""A folder that a run exports to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders.files import CONFIG
from hybrid_jax.models.folders.peft import ADAPTER_CONFIG

EXPORT_MARK = "hybrid_jax.json"  # in a folder that we exported, and so may write again
VALUE = "value"  # folder in an export that holds the value function
HEADS = "heads"  # folder in an export that holds a folder for each head


def check_export_folder(folder: Path) -> None:
    """Raises `UserError` where `claim_export_folder` would not write over what is there; writes nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to export to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / EXPORT_MARK).is_file():
        raise UserError(f"{folder} is not empty and no export of ours; give a new or an empty folder")


def claim_export_folder(folder: Path, step: int | None) -> None:
    """Makes a folder ours to export to: until all is there again, nothing can be loaded from it.

    Raises:
        UserError: the folder holds something that we did not export, or cannot be written.
    """
    check_export_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EXPORT_MARK).write_text(json.dumps({"step": step}) + "\n")
        for name in (CONFIG, ADAPTER_CONFIG):
            (folder / name).unlink(missing_ok=True)
        for name in (VALUE, HEADS):  # of the policy that was here
            shutil.rmtree(folder / name, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
