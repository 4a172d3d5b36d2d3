"""Rewards for the form of a response: JSON, a JSON schema, a regular expression."""

from __future__ import annotations

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NoReturn

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Seconds, settings
from hybrid_jax.metrics.packages import import_package
from hybrid_jax.rewards.base import REWARDS

_FENCE = re.compile(r"\A```(?:json|JSON)?[ \t]*\n(.*)\n```\Z", re.DOTALL)
_INVALID = object()
_DEADLINE: ContextVar[float] = ContextVar("_DEADLINE")  # of a schema, on the monotonic clock

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

    References to other documents are not fetched: a schema must hold its own definitions. Patterns are those
    of the package regex, which can stop a search. A response that takes longer than ``timeout_seconds`` scores
    0, and a warning says so, as for the reward ``regex``.

    Attributes:
        schema: The schema, as a mapping.
        fenced: Whether the value may stand in a Markdown fence of its own.
        timeout_seconds: For one response.
    """

    schema: Mapping[str, Any]
    fenced: bool = True
    timeout_seconds: Seconds = 1.0

    def __post_init__(self) -> None:
        jsonschema = import_package("jsonschema", "the reward json_schema")
        regex = import_package("regex", "the reward json_schema")
        patterns = jsonschema.FormatChecker(formats=())
        patterns.checks("regex", raises=regex.error)(_is_pattern)
        try:
            jsonschema.validators.validator_for(self.schema).check_schema(self.schema, format_checker=patterns)
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema must be a JSON schema: {error.message}") from error

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        validator = _validator(json.dumps(self.schema, sort_keys=True))
        return [self._score(validator, _json_value(response, self.fenced)) for response in responses]

    def _score(self, validator: Any, value: Any) -> float:
        from referencing.exceptions import Unresolvable  # jsonschema depends on it

        _DEADLINE.set(time.monotonic() + self.timeout_seconds)
        try:
            return float(value is not _INVALID and validator.is_valid(value))
        except RecursionError:  # nested deeper than any honest answer
            return 0.0
        except TimeoutError:
            logger.warning(
                "json_schema: the schema took more than %g s on a response, which scores 0",
                self.timeout_seconds,
            )
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
    usual = validators.validator_for(parsed)
    own = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    keywords = {name: _timed(keyword) for name, keyword in {**usual.VALIDATORS, **own}.items()}
    return validators.extend(usual, keywords)(parsed, registry=Registry())  # an own registry fetches nothing


# --------------------------------- keywords of a schema, as jsonschema calls them, with a time-out


def _timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
    """The same keyword, unless it is too late: choices of choices can take exponential time, too."""

    @functools.wraps(keyword)
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if time.monotonic() > _DEADLINE.get():
            raise TimeoutError
        return keyword(validator, value, instance, schema)

    return check


def _found(pattern: str, text: str) -> bool:
    import regex

    return regex.search(pattern, text, timeout=max(_DEADLINE.get() - time.monotonic(), 1e-3)) is not None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "string") and not _found(pattern, instance):
        yield _error(f"no match of {pattern!r}")


def _pattern_properties(validator: Any, schemas: Any, instance: Any, schema: Any) -> Iterator[Any]:
    for name, value in instance.items() if validator.is_type(instance, "object") else ():
        for pattern, wanted in schemas.items():
            if _found(pattern, name):
                yield from validator.descend(value, wanted, path=name, schema_path=pattern)


def _additional_properties(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    for name, value in instance.items() if validator.is_type(instance, "object") else ():
        known = name in schema.get("properties", {})
        if not (known or any(_found(pattern, name) for pattern in schema.get("patternProperties", {}))):
            yield from validator.descend(value, wanted, path=name)


def _error(message: str) -> Any:
    from jsonschema import ValidationError

    return ValidationError(message)


def _is_pattern(text: Any) -> bool:
    """Tells whether a pattern compiles, for the format checker of jsonschema."""
    import regex

    return not isinstance(text, str) or bool(regex.compile(text))
