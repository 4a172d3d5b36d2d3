"""Digests of what a run is made of beside its settings: rows, tokenizer, user code and files.

Every checkpoint holds their digests by name, so that a run which goes on can say what has changed meanwhile
under the same settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.fingerprint import digest, file_digest, is_own_code, rows_digest
from hybrid_jax.data.continuations import encode_prompts
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.runs.changes import Change

Contents = Mapping[str, str]  # digests, by the dotted name of the setting that they are of

# Letters, digits, spaces and scripts that tokenizers split each in their own way.
_PROBE = (
    "The 12,345 naïve CAFÉs aren't\tfar…\n\n  def f(x_1): return x**2  # 你好, мир! 👩‍🚀 ﬁne\r\n<|endoftext|>"
)
_FILE_SETTINGS = ("path", "encoder")  # texts that may be a folder of this machine or a name on the hub
_WRITTEN_SETTINGS = ("cache_dir",)  # what a component writes

log = logging.getLogger(__name__)


def contents(
    components: Mapping[str, Any],
    tokenizer: Tokenizer,
    train: Sequence[Example],
    held_out: Callable[[], Sequence[Example]],
) -> Contents:
    """Digests of all that a run is made of; a second for 100 MB of rows.

    Args:
        components: parts of the config by their names, whose code and files count.
        tokenizer: of the run.
        train: the training rows as they were loaded.
        held_out: loads the held-out rows, which not every source has.
    """
    found = {f"tokenizer.{name}": digest(value) for name, value in _of_tokenizer(tokenizer).items()}
    found["data.train"] = _of_rows(train)
    with contextlib.suppress(UserError):
        found["data.held_out"] = _of_rows(held_out())
    return found | dict(_of_component(components, ""))


def changed(there: Contents, here: Contents, step: int) -> list[Change]:
    """Finds and reports in one line what has changed since the checkpoint of ``step``.

    What is in one of them alone is a change of the settings.

    Raises:
        UserError: the tokenizer is another one: the weights know the tokens of the old one.
    """
    if not there:
        log.info(
            "checkpoint %d is from before version 0.4.1 and holds no checksums: whether data, tokenizer and "
            "rewards are the same is not checked",
            step,
        )
    found = [
        Change(name, there[name], here[name]) for name in there if here.get(name, there[name]) != there[name]
    ]
    if others := [change.name for change in found if change.name.startswith("tokenizer.")]:
        raise UserError(
            f"the tokenizer is not the one that the run was trained with ({', '.join(others)} changed): bring "
            "back the folder tokenizer of its run_dir, or give another run_dir"
        )
    if found:
        told = [f"{change.name} ({change.before} -> {change.after})" for change in found]
        log.warning(
            "the run goes on at step %d with other contents under the same settings: %s; give another run_dir "
            "if they should not be mixed",
            *(step, ", ".join(told)),
        )
    return found


def _of_rows(rows: Sequence[Example]) -> str:
    fields = ([row.prompt, row.response, row.columns, row.messages] for row in rows)
    return f"{len(rows)} rows, {rows_digest(fields)}"


def _of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        encoding = encode_prompts(tokenizer, [_PROBE])[0]
    except Exception:  # one of the user's own may read other texts alone, and need not list its tokens
        encoding = None
    return {
        "vocabulary": sorted(getattr(tokenizer, "vocabulary", {}).items()),
        "special_tokens": sorted(getattr(tokenizer, "special_tokens", {}).items()),
        "end_token": tokenizer.eos_id,
        "chat_template": getattr(tokenizer, "chat_template", None),
        "encoding": encoding,
    }


def _of_component(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Digests of the user's code in a component and of the files that its settings name."""
    setting = name.rpartition(".")[2]
    if setting in _WRITTEN_SETTINGS:
        return
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if is_own_code(type(value)):
            yield name, digest(type(value))
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        yield from _of_component(held, name)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _of_component(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _of_component(item, f"{name}.{index}")
    elif isinstance(value, Path | str):
        if _names_a_file(setting, value):
            yield name, file_digest(Path(value))
    elif callable(value):
        yield name, digest(value)


def _names_a_file(setting: str, value: Path | str) -> bool:
    """Tells paths from words: "data" may be the name of a folder by chance, and "/" a separator."""
    told = isinstance(value, Path) or setting in _FILE_SETTINGS or "/" in value or "." in value
    try:
        path = Path(value)
        return told and (path.is_file() or path.is_dir()) and not Path.cwd().is_relative_to(path.resolve())
    except (OSError, ValueError):
        return False
