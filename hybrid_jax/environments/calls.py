"""Calls of functions in an answer, read strictly.

    <tool_call>{"name": "calculator", "arguments": {"expression": "2 * 3"}}</tool_call>   Hermes, Qwen
    calculator(2 * 3)                                                                     for small models

The second form is the whole answer and calls a function of one argument, whose text it is. Only functions that
are given are called, with arguments of the types that they declare; everything else is an error that the policy
reads.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_PLAIN = re.compile(r"([A-Za-z_]\w*)\((.*)\)", re.DOTALL)
MOST_CALLS = 16  # in one answer
_TYPES: Mapping[str, tuple[type, ...]] = {
    **{"string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)},
    **{"array": (list,), "object": (dict,), "null": (type(None),)},
}


class CallError(Exception):
    """A call that cannot be made; the text says why, to the policy."""


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, of its annotations and its docstring in Google style.

    Raises:
        UserError: an argument lacks a type or a sentence.
    """
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # of the parsers of docstrings and of hints
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tool {function.__name__!r} needs types and a docstring: {reason}") from error


def call_tools(
    text: str, functions: Mapping[str, Callable[..., Any]], schemas: Sequence[Mapping[str, Any]]
) -> tuple[list[Message], int]:
    """Makes the calls in an answer, in order.

    Args:
        text: of the answer.
        functions: that may be called, by name.
        schemas: of all of them, by `schema_of`.

    Returns:
        A message of the role ``tool`` for each call, none where nothing is called, and the number of errors.
    """
    declared = {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}
    written = _CALL.findall(text)
    if not len(written) == text.count("<tool_call>") == text.count("</tool_call>") <= MOST_CALLS:
        error = f"error: a <tool_call> is not closed, or there are more than {MOST_CALLS}"
        return [{"role": "tool", "content": error}], 1
    readers: list[Callable[[], tuple[str, dict[str, Any]]]] = [
        partial(_read, each, declared) for each in written
    ]
    plain = _PLAIN.fullmatch(text.strip())
    if plain is not None and plain[1] in declared:
        readers = [partial(_read_plain, plain[1], plain[2], declared[plain[1]])]
    messages, errors = list[Message](), 0
    for read in readers:
        name = ""
        try:
            name, arguments = read()
            content = str(functions[name](**arguments))
        except Exception as error:  # of the call, or of the function itself
            content, errors = f"error: {' '.join(str(error).split())[:300]}", errors + 1
        messages.append({"role": "tool", **({"name": name} if name else {}), "content": content})
    return messages, errors


def _read(written: str, declared: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    try:
        call = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CallError(f"a call must be JSON: {error}") from None
    if (
        not isinstance(call, dict)
        or call.keys() != {"name", "arguments"}
        or not isinstance(call["arguments"], dict)
    ):
        raise CallError('a call must be {"name": …, "arguments": {…}}')
    name, arguments = call["name"], call["arguments"]
    _check_call(name, arguments, declared)
    return name, arguments


def _read_plain(name: str, written: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    properties = parameters.get("properties", {})
    if len(properties) != 1:
        raise CallError(f"{name} has {len(properties)} arguments: call it in <tool_call>")
    ((key, schema),) = properties.items()
    try:
        value = written if schema.get("type") == "string" else json.loads(written)
    except (ValueError, RecursionError) as error:
        raise CallError(f"{name}: {key} must be JSON: {error}") from None
    _check_call(name, {key: value}, {name: parameters})
    return name, {key: value}


def _check_call(name: Any, arguments: Mapping[str, Any], declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that the function is there, and takes these arguments."""
    if not isinstance(name, str) or name not in declared:
        raise CallError(f"there is no function {name!r}; known: {', '.join(declared)}")
    properties, required = declared[name].get("properties", {}), declared[name].get("required", ())
    if missing := [key for key in required if key not in arguments]:
        raise CallError(f"{name} lacks the argument {missing[0]!r}")
    for key, value in arguments.items():
        if key not in properties:
            raise CallError(f"{name} has no argument {key!r}; known: {', '.join(properties) or 'none'}")
        _check(f"{name}: {key}", value, properties[key])


def _check(where: str, value: Any, schema: Mapping[str, Any]) -> None:
    """Checks a value against the type, the choices and the items of a schema."""
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    kinds += ["null"] * bool(schema.get("nullable"))
    fits = any(isinstance(value, _TYPES[kind]) for kind in kinds)
    if not fits or (isinstance(value, bool) and "boolean" not in kinds):
        raise CallError(f"{where} must be of type {' or '.join(kinds)}, got {json.dumps(value)[:60]}")
    if "enum" in schema and value not in schema["enum"]:
        raise CallError(
            f"{where} must be one of {', '.join(map(str, schema['enum']))}, got {json.dumps(value)[:60]}"
        )
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            _check(f"{where}[{number}]", item, schema["items"])


def tools_of_object(thing: Any, without: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The public methods of an object, by name, but those that are left out.

    Raises:
        UserError: one is asynchronous.
    """
    methods = inspect.getmembers(thing, inspect.ismethod)
    found = {name: method for name, method in methods if name not in without and not name.startswith("_")}
    for name, method in found.items():
        if inspect.iscoroutinefunction(method):
            raise UserError(f"the tool {name!r} must not be async: conversations run on threads")
    return found
