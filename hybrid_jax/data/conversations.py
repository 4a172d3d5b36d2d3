"""Conversations as data: rows with a list of messages, in the form that chat models are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_jax.core.batches import Example, Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, Fraction, settings
from hybrid_jax.data.files import json_rows
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.messages import check_messages
from hybrid_jax.data.oldest_turns import one_turn_each
from hybrid_jax.data.sources import SOURCES, HuggingFaceDataset, Split, check_held_out, choose
from hybrid_jax.data.template_inputs import TemplateInputs

CONVERSATIONS = "conversations"  # the field that ShareGPT calls them by
RESPONSE_FIELDS = ("completion", "response")
_INPUTS = TemplateInputs()


@SOURCES.register("chat")
@settings(kw_only=True)
class Chat(TemplateInputs, Filtered):
    """Conversations, rows like ``{"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}``.

    Messages may also be ShareGPT's, ``{"conversations": [{"from": "human", "value": …}, …]}``, or the JSON of a
    list. A row may also be split, ``{"prompt": [messages], "completion": [messages]}`` (or "response"), and
    either part may be a plain text. SFT learns all turns of the assistant but those with ``train: false`` or
    ``weight: 0``, which it reads; PPO and the evaluation answer what stands before the last one. All other
    fields are columns for the rewards; "messages" is the column with what was asked.

    Attributes:
        train: a file of JSON lines, of one JSON list or of parquet, or a folder that `datasets` reads (a saved
            dataset, or parquet or JSON files).
        held_out: the same for the held-out data.
        held_out_fraction: instead of it, the share in (0, 1) of the conversations to hold out, chosen by a hash
            of what is asked: equal questions stay on one side.
        messages_field: the field with the messages; "conversations" where a row has none.
        train_split: in a folder with several splits, the one to train on.
        held_out_split: in such a folder, the held-out one.
        context_turns: turns that an answer is read behind, its own question's included: 1 is the next utterance
            from the previous one alone. A turn begins with a message of the user; those of the system stay. A
            conversation then becomes a row for each turn that is answered, with its answer as the column
            "references" where the data has none. None reads all.
    """

    train: Path
    held_out: Path | None = None
    held_out_fraction: Fraction | None = None
    messages_field: str = "messages"
    train_split: str = "train"
    held_out_split: str | None = None
    context_turns: Count | None = None

    def __post_init__(self):
        super().__post_init__()
        check_held_out(self.held_out_fraction, held_out=self.held_out, held_out_split=self.held_out_split)

    def load(self, split: Split) -> Sequence[Example]:
        """Reads the conversations of the split."""
        path, name = Path(self.train), self.train_split
        if split == "held_out":
            path, name = Path(self.held_out or self.train), self.held_out_split or name
        own = self.held_out is not None or self.held_out_split is not None
        rows = self.kept(_rows(path, name), str(path))
        examples = [conversation(row, where, self.messages_field, self) for where, row in rows]
        examples = choose(examples, split, own, self.held_out_fraction, str(path))
        return examples if self.context_turns is None else _turn_by_turn(examples, self.context_turns)


def _turn_by_turn(examples: Iterable[Example], count: int) -> list[Example]:
    """An example for each answered turn, which reads ``count`` turns."""
    return [
        _with_reference(chat_example(messages, example.where, example.columns, example.template_variables))
        for example in examples
        for messages in one_turn_each(example.messages, count)
    ]


def _with_reference(example: Example) -> Example:
    """The example with its answer as what rewards compare with, where it has nothing else."""
    if example.response is None:
        return example
    return replace(example, columns={"references": example.response, **example.columns})


def conversation(
    row: Mapping[str, Any],
    where: str,
    messages_field: str = "messages",
    inputs: TemplateInputs = _INPUTS,
) -> Example:
    """Makes the example of one row.

    Args:
        row: of the data.
        where: it stands, for errors.
        messages_field: the field with the messages.
        inputs: what the template reads beside them.

    Raises:
        UserError: the row has no messages, or one of them is not a role that we know with a text.
    """
    name = next((name for name in (messages_field, CONVERSATIONS) if row.get(name) is not None), None)
    if name is not None:
        messages, used = check_messages(row[name], where, name), {name}
    elif row.get("prompt") is not None:
        response = next((field for field in RESPONSE_FIELDS if row.get(field) is not None), None)
        messages = _messages(row["prompt"], where, "prompt", "user")
        messages += _messages(row[response], where, response, "assistant") if response else ()
        used = {"prompt", *RESPONSE_FIELDS[: RESPONSE_FIELDS.index(response) + 1 if response else 2]}
    else:
        raise UserError(
            f"{where}: no field {messages_field!r} and no 'prompt'; fields: {', '.join(row) or 'none'}"
        )
    variables = inputs.template_variables(row, where)
    columns = {key: value for key, value in inputs.columns(row, variables).items() if key not in used}
    return chat_example(messages, where, columns, variables)


def chat_example(
    messages: Sequence[Message],
    where: str,
    columns: Mapping[str, Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Example:
    """Makes an example of checked messages, and of what the template reads beside them."""
    asked = Example("", messages=tuple(messages)).question
    if len(asked) == len(messages) and not any(message["role"] == "user" for message in asked):
        raise UserError(f"{where}: neither an answer to learn nor a user's message to answer")
    response = messages[-1]["content"] if len(asked) < len(messages) else None
    columns = {**(columns or {}), "messages": list(asked)}
    prompt = asked[-1]["content"] if asked else ""
    return Example(prompt, response, columns, tuple(messages), where, variables or {})


def _messages(value: Any, where: str, field: str, role: str | None = None) -> tuple[Message, ...]:
    """Checked messages; a plain text is one message of ``role``."""
    if isinstance(value, str) and role is not None:
        return ({"role": role, "content": value},)
    return check_messages(value, where, field)


def _rows(path: Path, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".parquet" and not path.is_dir():
        dataset = HuggingFaceDataset(path="parquet", data_files={split: str(path)}).rows(split)
    elif path.is_dir():
        dataset = HuggingFaceDataset(path=str(path)).rows(split)
    else:
        return json_rows(path)
    return ((f"{path}, row {number}", row) for number, row in enumerate(dataset, start=1))
