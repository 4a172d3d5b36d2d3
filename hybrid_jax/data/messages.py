"""Messages in one form, from the forms that data sets write them in.

    {"role": "user", "content": "2 + 2?"}                               the form that chat templates read
    {"from": "human", "value": "2 + 2?"}                                ShareGPT
    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}   content in parts
    {"role": "assistant", "content": null, "tool_calls": [...]}         a call without words
    {"role": "assistant", "function_call": {"name": ..., "arguments": "{...}"}}   as OpenAI wrote it until 2023

A null in an object stands for a key that is not there: Arrow writes one for every key that another row has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybrid_jax.core.batches import Message
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import parse_json, shown
from hybrid_jax.core.registry import suggest

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose text is the JSON of calls
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(value: Any, where: str, field: str = "messages") -> tuple[Message, ...]:
    """Reads a list of messages, or the JSON of one, into messages with a known role and a text.

    Raises:
        UserError: one line with the message's number, what was expected and got.
    """
    given = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, f"{where}: {field}")
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: {field!r} must be a list of messages, got {shown(given)}")
    return tuple(_message(item, f"{where}: {field}[{index}]") for index, item in enumerate(value))


def without_nulls(value: Any, where: str) -> Any:
    """Copies a value as JSON has it, without the keys of objects whose value is null.

    Raises:
        UserError: something in it is no JSON, such as a date that Arrow has read out of a text.
    """
    if isinstance(value, Mapping):
        return {
            str(key): without_nulls(item, f"{where}.{key}") for key, item in value.items() if item is not None
        }
    if isinstance(value, list | tuple):
        return [without_nulls(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if (
        value is None
        or isinstance(value, str | bool | int)
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return value
    raise UserError(f"{where} must be a value that JSON has, got {shown(value)}; write it as a text")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise UserError(f"{where} must be {{role: …, content: …}}, got {shown(item)}")
    if "role" not in item and "from" in item and "value" in item:
        item = {"role": item["from"], "content": item["value"]} | {
            key: value for key, value in item.items() if key not in ("from", "value")
        }
    if "role" not in item:
        raise UserError(f"{where} has no 'role'; {suggest('role', list(map(str, item)))}")
    message = without_nulls({key: value for key, value in item.items() if key != "content"}, where)
    if message.get("role") in CALLS:
        message |= {"role": "assistant", "tool_calls": _calls_of_text(item.get("content"), where)}
        item = {**item, "content": None}
    message["role"] = _role(item["role"] if "tool_calls" not in message else message["role"], where)
    _read_calls(message, where)
    _read_weight(message, where)
    return {"role": message.pop("role"), "content": _content(item, message, where), **message}


def _role(role: Any, where: str) -> str:
    known = OTHER_NAMES.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        raise UserError(f"{where}.role is {role!r}; {suggest(str(role), ROLES)}")
    return known


def _content(item: Mapping[str, Any], message: Message, where: str) -> str:
    """The text of a message; a call needs none."""
    content = item.get("content")
    if content is None and "tool_calls" in message:
        return ""
    if "content" not in item:
        raise UserError(f"{where} has no 'content'; {suggest('content', list(map(str, item)))}")
    if isinstance(content, list | tuple) and content:
        return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise UserError(f"{where}.content must be a text, got {shown(content)}")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type", "text"), str):
        raise UserError(f"{where} must be {{type: text, text: …}}, got {shown(part)}")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise UserError(f"{where} is of type {kind!r}; only texts are read: leave out such rows by data.filter")
    if not isinstance(part.get("text"), str):
        raise UserError(f"{where}.text must be a text, got {shown(part.get('text'))}")
    return part["text"]


def _read_calls(message: dict[str, Any], where: str) -> None:
    """Puts the calls of a message into ``tool_calls``, with arguments as the object that templates write."""
    if "function_call" in message:
        call = message.pop("function_call")
        if "tool_calls" in message:
            raise UserError(f"{where} has 'tool_calls' and 'function_call'; keep one")
        message["tool_calls"] = [{"type": "function", "function": call}]
    calls = message.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = parse_json(calls, f"{where}.tool_calls")
    if calls is None or calls == []:
        return
    if message["role"] != "assistant":
        raise UserError(f"{where}.tool_calls must be of the assistant, got {message['role']!r}")
    if not isinstance(calls, list):
        raise UserError(f"{where}.tool_calls must be a list of calls, got {shown(calls)}")
    message["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call, whose name and arguments stand under "function" or in the call itself."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise UserError(
            f"{where} must be {{type: function, function: {{name: …, arguments: …}}}}, got {shown(call)}"
        )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.arguments must be an object or its JSON, got {shown(inner['arguments'])}")
    read = {**inner, "arguments": arguments}
    return {**call, "function": read} if "function" in call else read


def _calls_of_text(text: Any, where: str) -> list[dict[str, Any]]:
    """The calls of ShareGPT's "function_call": the JSON of one, or of a list."""
    if not isinstance(text, str):
        raise UserError(f"{where}.value must be the JSON of a call, got {shown(text)}")
    calls = parse_json(text, f"{where}.value")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _read_weight(message: dict[str, Any], where: str) -> None:
    """Puts ``train: false`` or ``weight: 0`` into ``train``; an answer to learn has neither."""
    train, weight = message.pop("train", None), message.pop("weight", None)
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where}.train must be true or false, got {shown(train)}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise UserError(f"{where}.weight must be 0 (only read) or 1 (learned), got {shown(weight)}")
    if train is not None and weight is not None and train != bool(weight):
        raise UserError(f"{where} has train {str(train).lower()} and weight {weight}; keep one")
    learned = train if train is not None else weight
    if learned is None:
        return
    if learned and message["role"] != "assistant":
        raise UserError(
            f"{where} is of the {message['role']}: only answers are learned; leave out train or weight"
        )
    if not learned and message["role"] == "assistant":
        message["train"] = False
