"""Conversations as data: rows with a list of messages, in the form that chat models are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_jax.core.batches import Example, Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.core.ranges import Fraction, settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.data.files import json_rows
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.sources import SOURCES, HuggingFaceDataset, Split, check_held_out, choose

ROLES = ("system", "developer", "user", "assistant", "tool")
RESPONSE_FIELDS = ("completion", "response")


@SOURCES.register("chat")
@settings(kw_only=True)
class Chat(Filtered):
    """Conversations, rows like ``{"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}``.

    A row may also be split, ``{"prompt": [messages], "completion": [messages]}`` (or "response"), and either
    part may be a plain text. SFT learns all turns of the assistant; PPO and the evaluation answer what stands
    before the last one. All other fields are columns for the rewards; "messages" is the column with what was
    asked.

    Attributes:
        train: a JSON-lines file, or a folder that `datasets` reads (a saved dataset, or parquet or JSON files).
        held_out: the same for the held-out data.
        held_out_fraction: instead of it, the share in (0, 1) of the conversations to hold out, chosen by a hash
            of what is asked: equal questions stay on one side.
        messages_field: the field with the messages.
        train_split: in a folder with several splits, the one to train on.
        held_out_split: in such a folder, the held-out one.
    """

    train: Path
    held_out: Path | None = None
    held_out_fraction: Fraction | None = None
    messages_field: str = "messages"
    train_split: str = "train"
    held_out_split: str | None = None

    def __post_init__(self):
        check_held_out(self.held_out_fraction, held_out=self.held_out, held_out_split=self.held_out_split)

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the conversations of the split."""
        path, name = Path(self.train), self.train_split
        if split == "held_out":
            path, name = Path(self.held_out or self.train), self.held_out_split or name
        own = self.held_out is not None or self.held_out_split is not None
        rows = self.kept(_rows(path, name), str(path))
        examples = [conversation(row, where, self.messages_field) for where, row in rows]
        return choose(examples, split, own, self.held_out_fraction, str(path))


def conversation(row: Mapping[str, Any], where: str, messages_field: str = "messages") -> Example:
    """Makes the example of one row.

    Raises:
        UserError: the row has no messages, or one of them is not a role that we know with a text.
    """
    if messages_field in row:
        messages, used = _messages(row[messages_field], where, messages_field), {messages_field}
    elif "prompt" in row:
        response = next((field for field in RESPONSE_FIELDS if field in row), None)
        messages = _messages(row["prompt"], where, "prompt", "user")
        messages += _messages(row[response], where, response, "assistant") if response else ()
        used = {"prompt", response}
    else:
        raise UserError(
            f"{where}: no field {messages_field!r} and no 'prompt'; fields: {', '.join(row) or 'none'}"
        )
    columns = {key: value for key, value in row.items() if key not in used}
    return chat_example(messages, where, columns)


def chat_example(messages: Sequence[Message], where: str, columns: Mapping[str, Any] | None = None) -> Example:
    """Makes an example of checked messages."""
    asked = Example("", messages=tuple(messages)).question
    if not any(message["role"] == "user" for message in asked):
        raise UserError(f"{where}: no user message before an answer; a conversation begins with a question")
    response = messages[-1]["content"] if len(asked) < len(messages) else None
    columns = {**(columns or {}), "messages": list(asked)}
    return Example(asked[-1]["content"], response, columns, tuple(messages), where)


def check_messages(value: Any, where: str, field: str = "messages") -> tuple[Message, ...]:
    """Checks a list of messages: each must have a known role and a text.

    Raises:
        UserError: one line with the message's number, what was expected and got.
    """
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: {field!r} must be a list of messages, got {shown(value)}")
    return tuple(_message(item, f"{where}: {field}[{index}]") for index, item in enumerate(value))


def _messages(value: Any, where: str, field: str, role: str | None = None) -> tuple[Message, ...]:
    """Checked messages; a plain text is one message of ``role``."""
    if isinstance(value, str) and role is not None:
        return ({"role": role, "content": value},)
    return check_messages(value, where, field)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} must be {{role: …, content: …}}, got {shown(item)}")
    for key in ("role", "content"):
        if key not in item:
            raise UserError(f"{where} has no {key!r}; {suggest(key, list(map(str, item)))}")
    if item["role"] not in ROLES:
        raise UserError(f"{where}.role is {item['role']!r}; {suggest(str(item['role']), ROLES)}")
    if not isinstance(item["content"], str):
        raise UserError(f"{where}.content must be a text, got {shown(item['content'])}")
    return {key: value for key, value in item.items() if value is not None}


def _rows(path: Path, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if not path.is_dir():
        return json_rows(path)
    dataset = HuggingFaceDataset(path=str(path)).rows(split)
    return ((f"{path}, row {number}", row) for number, row in enumerate(dataset, start=1))
