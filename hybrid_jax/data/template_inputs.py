"""Inputs of a chat template beside the messages: tools, documents, and arguments by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import parse_json, shown
from hybrid_jax.core.ranges import settings
from hybrid_jax.data.messages import without_nulls

KWARGS = "chat_template_kwargs"  # the column with arguments for one row
# What the rendering itself gives a template or is called with.
_TAKEN = {
    *("messages", "conversations", "conversation", "tools", "documents", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_dict", "return_assistant_tokens_mask"),
    *("additional_special_tokens", "raise_exception", "strftime_now"),
}


@settings(kw_only=True)
class TemplateInputs:
    """Rows of conversations whose template reads more than messages.

    Attributes:
        tools_field: the field with the tools: a list of JSON schemas, or the JSON of one. Where a row has none,
            "functions", as OpenAI wrote them until 2023. It stays a column for the rewards. None reads none.
        documents_field: the field with the documents to answer from: a list of objects. None reads none.
        chat_template_kwargs: arguments for the chat template by name, such as ``{enable_thinking: false}``. A
            row's own field "chat_template_kwargs" goes before them.
    """

    tools_field: str | None = "tools"
    documents_field: str | None = "documents"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            _check_names(self.chat_template_kwargs, KWARGS)
        except UserError as error:
            raise ValueError(str(error)) from error

    def template_variables(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The variables that the template reads of a row beside its messages.

        Raises:
            UserError: one line with the place and the field, where it holds something else.
        """
        variables = {**self.chat_template_kwargs, **_kwargs(row.get(KWARGS), f"{where}: {KWARGS}")}
        if self.tools_field is not None:
            tools = _objects(row.get(self.tools_field), where, self.tools_field)
            functions = _objects(row.get("functions"), where, "functions") if tools is None else None
            if functions is not None:
                tools = [{"type": "function", "function": function} for function in functions]
            if tools is not None:
                variables["tools"] = tools
        if self.documents_field is not None:
            documents = _objects(row.get(self.documents_field), where, self.documents_field)
            if documents is not None:
                variables["documents"] = documents
        return variables

    def columns(self, row: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row, with tools and documents as the template reads them."""
        columns = {key: value for key, value in row.items() if key != KWARGS}
        for name, own in (("tools", self.tools_field), ("documents", self.documents_field)):
            if own in columns and name in variables:
                columns[own] = variables[name]
            elif own in columns and columns[own] is None:  # of another row, which Arrow keeps beside this one
                del columns[own]
        return columns


def _objects(value: Any, where: str, name: str) -> list[Any] | None:
    """The list of objects in a field, given as it is or as JSON; None where there is none."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"{where}: {name}")
    elif value is not None and value != "":
        value = without_nulls(value, f"{where}: {name}")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(
            f"{where}: {name!r} must be a list of objects, or the JSON of one, got {shown(value)}; a column of "
            f"that name that no chat template is to read is left alone by {name}_field: null"
        )
    return value


def _kwargs(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, where)
    elif value is not None:
        value = without_nulls(value, where)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a mapping of names to values, got {shown(value)}")
    _check_names(value, where)
    return value


def _check_names(kwargs: Mapping[str, Any], where: str) -> None:
    for name in kwargs:
        if not name.isidentifier() or name.startswith("_"):
            raise UserError(f"{where} must name variables of a template, got {name!r}")
        if name in _TAKEN or name.endswith("_token"):
            column = f"; put it into the column {name!r}" if name in ("tools", "documents", "messages") else ""
            raise UserError(
                f"{where} must not name {name!r}, which the chat template is given otherwise{column}"
            )
