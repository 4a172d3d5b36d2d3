"""Rewards for the form of a response: JSON, a JSON schema, a regular expression."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from hybrid_jax.core.ranges import Seconds, settings
from hybrid_jax.core.registry import UserError
from hybrid_jax.metrics.packages import import_package
from hybrid_jax.rewards.base import REWARDS

_FENCE = re.compile(r"\A```(?:json|JSON)?[ \t]*\n(.*)\n```\Z", re.DOTALL)
_INVALID = object()

logger = logging.getLogger(__name__)


@REWARDS.register("json_valid")
@settings
class JsonValid:
    """1 if the whole response is one JSON value (RFC 8259: no NaN, no comments), else 0.

    Attributes:
        kind: What value is wanted; ``any`` takes a bare number, too.
        fenced: Whether the value may stand in a Markdown fence of its own.
    """

    kind: Literal["object", "array", "any"] = "object"
    fenced: bool = True

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        wanted = {"object": dict, "array": list, "any": object}[self.kind]
        values = [_json_value(response, self.fenced) for response in responses]
        return [float(value is not _INVALID and isinstance(value, wanted)) for value in values]


@REWARDS.register("json_schema")
@settings
class JsonSchema:
    """1 if the response is JSON that the schema accepts, else 0; by the package jsonschema.

    References to other documents are not fetched: a schema must hold its own definitions.

    Attributes:
        schema: The schema, as a mapping.
        fenced: Whether the value may stand in a Markdown fence of its own.
    """

    schema: Mapping[str, Any]
    fenced: bool = True

    def __post_init__(self) -> None:
        jsonschema = import_package("jsonschema", "the reward json_schema")
        try:
            jsonschema.validators.validator_for(self.schema).check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema must be a JSON schema: {error.message}") from error

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        validator = _validator(json.dumps(self.schema, sort_keys=True))
        return [self._score(validator, _json_value(response, self.fenced)) for response in responses]

    def _score(self, validator: Any, value: Any) -> float:
        from referencing.exceptions import Unresolvable  # jsonschema depends on it

        try:
            return float(value is not _INVALID and validator.is_valid(value))
        except RecursionError:  # nested deeper than any honest answer
            return 0.0
        except Unresolvable as error:
            raise UserError(f"schema: the reference {error.ref!r} is not within the schema") from error


@REWARDS.register("regex")
@settings
class Regex:
    """1 if the response matches a regular expression, else 0; by the package regex, which can stop a search.

    A pattern such as ``(a|aa)+`` takes exponential time on texts that do not match. A response that takes
    longer than ``timeout_seconds`` scores 0, and a warning names it; rewrite the pattern then, for which
    response takes too long depends on the machine.

    Attributes:
        pattern: The expression; ``(?s)`` lets ``.`` match a new line.
        match: Whether the whole response must match, or any part of it.
        timeout_seconds: For one response.
    """

    pattern: str
    match: Literal["full", "search"] = "full"
    timeout_seconds: Seconds = 1.0

    def __post_init__(self) -> None:
        regex = import_package("regex", "the reward regex")
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern must be a regular expression, got {self.pattern!r}: {error}") from error

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        compiled = import_package("regex", "the reward regex").compile(self.pattern)
        test = compiled.fullmatch if self.match == "full" else compiled.search
        return [self._score(test, response) for response in responses]

    def _score(self, test: Any, response: str) -> float:
        try:
            return float(test(response, timeout=self.timeout_seconds) is not None)
        except TimeoutError:
            logger.warning(
                "regex: pattern %r took more than %g s on a response of %d characters, which scores 0",
                self.pattern,
                self.timeout_seconds,
                len(response),
            )
            return 0.0


def _json_value(text: str, fenced: bool) -> Any:
    stripped = text.strip()
    if fenced and (match := _FENCE.match(stripped)):
        stripped = match[1]
    try:
        return json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@functools.lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    from jsonschema import validators
    from referencing import Registry

    parsed = json.loads(schema)
    return validators.validator_for(parsed)(parsed, registry=Registry())  # an own registry fetches nothing
