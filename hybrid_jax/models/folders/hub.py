"""Models by their id on the Hugging Face hub: found in its cache, or downloaded into it."""

from __future__ import annotations

import re
from pathlib import Path

from hybrid_jax.core.errors import UserError

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "model*.safetensors"]
_OLD_FILES = ["pytorch_model*.bin"]


def find_folder(path: str | Path) -> Path:
    """The folder of a model: ``path`` if that is one, else where the hub's model of that id is kept.

    Args:
        path: of a folder (any `Path` is), or an id such as ``org/name``, ``name``, ``org/name@revision``. The
            hub's own settings hold: its cache (``HF_HOME``), ``HF_HUB_OFFLINE``, and the token of your login.

    Raises:
        UserError: there is neither such a folder nor such a model, it may not be read, or there is no network.
    """
    match = None if isinstance(path, Path) else _ID.fullmatch(path)
    if Path(path).exists() or match is None:
        return Path(path)
    repo, revision = match["repo"], match["revision"]
    folder = _download(repo, revision, _FILES)
    if not any(folder.glob("*.safetensors")):
        folder = _download(repo, revision, [*_FILES, *_OLD_FILES])
    return folder


def _download(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    name = f"no folder is called {repo!r}, and the model of that id"
    try:
        # files in sub-folders are those of other frameworks
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        problem = f"is gated: ask for access at https://huggingface.co/{repo}, then log in with `hf auth login`"
        raise UserError(f"{name} {problem}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        problem = "is not on the Hugging Face hub; a private one needs `hf auth login`"
        raise UserError(f"{name} {problem}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{name} is not in the cache, and {reason}") from error
    except (errors.HFValidationError, OSError) as error:
        raise UserError(f"{name} cannot be downloaded: {type(error).__name__}") from error
