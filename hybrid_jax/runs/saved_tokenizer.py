"""The tokenizer that a run saved when it started."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Tokenizer, load_tokenizer
from hybrid_jax.runs.files import RunFiles

log = logging.getLogger(__name__)


def saved_tokenizer(files: RunFiles) -> Tokenizer:
    """The tokenizer in a run directory, which begins texts as the run was trained.

    Before there was ``tokenizer.add_bos``, no text outside chat templates began with BOS, whatever the
    tokenizer says; a run from then goes on, answers and is exported without it.

    Raises:
        UserError: the training of the run has not begun.
    """
    folder = files.folder / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"{files.name} holds no tokenizer: its training has not begun")
    tokenizer = load_tokenizer(folder)
    if not tokenizer.start_ids or not _is_before_add_bos(files):
        return tokenizer
    log.warning(
        "%s began before there was tokenizer.add_bos and learned texts without the BOS token of its tokenizer: "
        "it goes on without; start a new run to train with it",
        files.name,
    )
    return load_tokenizer(folder, add_bos=False)


def _is_before_add_bos(files: RunFiles) -> bool:
    path = files.folder / "config.yaml"
    settings = load_yaml(path).get("tokenizer") if path.is_file() else None
    return isinstance(settings, Mapping) and settings.get("name") == "huggingface" and "add_bos" not in settings
