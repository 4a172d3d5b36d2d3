"""Reads config files into frozen dataclasses, strictly: types come from the hints, unknown keys are errors.

A field annotated ``Annotated[Reward, REWARDS]`` holds a component of that registry and is written in YAML as
``{name: ..., setting: ...}``. A `Path` is a path on this machine, never a URL; a field that may be either is
annotated ``Path | Url``. Ranges are declared on the fields (`hybrid_jax.core.ranges`); ``__post_init__`` checks
rules about several fields and raises ``ValueError``.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import re
import types
import typing
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.merging import Place, merge, put, registry_of, without_extras
from hybrid_jax.core.ranges import check_ranges, hints_of
from hybrid_jax.core.registry import NOTHING, Registry, is_definition, suggest
from hybrid_jax.core.secrets import text_without_secrets, without_secrets
from hybrid_jax.core.yaml_text import MOST_BITS, NUMBER, parse_yaml, read_yaml

T = TypeVar("T")

_YAML_VALUES = (int, float, list, set, bytes, datetime.date)  # beside texts and mappings


class Url(str):
    """The value of a setting that is a URL, such as ``gs://bucket/path``."""


def is_url(value: object) -> bool:
    """Tells whether a text or a path is a URL; ``Path("gs://a/b")``, which has lost a slash, is one too."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)) is not None


def local_path(value: str | Path, name: str) -> Path:
    """Converts ``value`` to a path on this machine.

    Raises:
        UserError: it is a URL, which `Path` would turn into a folder here, or holds a zero byte.
    """
    if "\0" in str(value):
        raise UserError(f"{name} must be a path, got {str(value)!r}, which holds a zero byte")
    if is_url(value):
        raise UserError(f"{name} must be a path on this machine, got the URL {str(value)!r}")
    path = Path(value)
    try:
        return path.expanduser()  # a shell expands ~ only outside quotes, and never in a file
    except RuntimeError:
        raise UserError(
            f"{name} begins with the home of a user whom this machine lacks, got {str(value)!r}"
        ) from None


def load_yaml(
    path: str | Path, overrides: Sequence[str] = (), kind: Any = Any, trust: Container[str] = NOTHING
) -> dict[str, Any]:
    """Reads a YAML file with its optional ``base:`` file, then applies ``a.b=value`` overrides.

    A key with dots at the top of a file means what it means on the command line.

    Args:
        path: of the file.
        overrides: texts over it, one after the other.
        kind: the dataclass that the settings are of, whose hints say what merges (`hybrid_jax.core.merging`).
        trust: names that may be imported to know their hints.
    """
    settings, place = read_yaml(path), Place(kind, trust, to_dict)
    base = settings.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise _wrong_type("base", "a path", base)
    dotted = {key: settings.pop(key) for key in [*settings] if "." in str(key)}
    if base:
        below = read_yaml(Path(path).parent / base)
        if "base" in below:
            raise UserError(f"{base} is the base of {path} and must have no base of its own")
        settings = merge(below, settings, place)
    for key, value in dotted.items():
        settings = put(settings, key.split("."), value, place)
    return apply_overrides(settings, overrides, kind, trust)


def apply_overrides(
    settings: dict[str, Any], overrides: Sequence[str], kind: Any = Any, trust: Container[str] = NOTHING
) -> dict[str, Any]:
    """Applies ``a.b=value`` texts to ``settings``, one after the other; the rest is as in `load_yaml`."""
    for override in overrides:
        path, value = _parse_override(override)
        settings = put(settings, path, value, Place(kind, trust, to_dict))
    return settings


def parse(cls: type[T], settings: Any, path: str = "", trust: Container[str] = NOTHING) -> T:
    """Builds a dataclass from a mapping.

    Args:
        cls: the dataclass.
        settings: the mapping.
        path: where it stands, for errors.
        trust: names that may run code: `EVERYTHING` only for what the user has given to this very command.

    Raises:
        Untrusted: a component runs code and its name is not in ``trust``.
        UserError: a setting is wrong; the line begins with its dotted path.
    """
    return _parse_dataclass(cls, settings, path, trust)


def to_dict(value: Any, hint: Any = Any) -> Any:
    """Writes a dataclass as plain values that YAML can hold, components with their names: undoes `parse`."""
    if registry := registry_of(hint):
        settings = to_dict(value) if dataclasses.is_dataclass(value) and not registry.as_it_is else {}
        return {"name": registry.name_of(value), **settings} if value is not None else None
    hint = without_extras(hint)
    if get_origin(hint) in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else to_dict(value, inner[0] if len(inner) == 1 else Any)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        return {
            f.name: to_dict(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value) if f.init
        }
    if isinstance(value, Mapping):
        inner = get_args(hint)[1] if len(get_args(hint)) == 2 else Any
        return {key: to_dict(item, inner) for key, item in value.items()}
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_args(hint) else Any
        return [to_dict(item, inner) for item in value]
    return str(value) if isinstance(value, Path | Url) else value


def _parse_override(override: str) -> tuple[list[str], Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(
            f"an override is written a.b=value, without spaces, got {text_without_secrets(override)!r}"
        )
    return dotted.split("."), parse_yaml(text, f"override {dotted!r}")


def _parse_value(hint: Any, value: Any, path: str, trust: Container[str]) -> Any:
    if registry := registry_of(hint):
        return _parse_component(registry, value, path, trust)
    hint = without_extras(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _parse_optional(arguments, value, path, trust)
    if origin is Literal:
        if value not in arguments:
            raise UserError(
                f"{path} must be one of {', '.join(map(str, arguments))}, got {_shown(value, path)}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return (
            value if isinstance(value, typing.cast(type, hint)) else _parse_dataclass(hint, value, path, trust)
        )
    if origin in (list, tuple, Sequence):
        return _parse_sequence(origin, arguments, value, path, trust)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(path, "a mapping", value)
        return {
            _parse_key(arguments[0], str(key), path): _parse_value(
                arguments[1], _named(arguments[1], str(key), item), _join(path, key), trust
            )
            for key, item in value.items()
        }
    return _parse_scalar(hint, value, path)


def _parse_dataclass(cls: Any, settings: Any, path: str, trust: Container[str]) -> Any:
    if not isinstance(settings, Mapping):
        raise _wrong_type(path or "config", "a mapping", settings)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = hints_of(cls)
    for key in settings:
        if key not in fields:
            raise UserError(f"unknown setting {_join(path, key)!r}; {suggest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in settings:
            raise UserError(f"{_join(path, name)} is missing")
    values = {}
    for key, value in settings.items():
        value = _over_default(fields[key], hints[key], value, trust)
        values[key] = _parse_value(hints[key], value, _join(path, key), trust)
    try:
        check_ranges(cls, values)  # the dataclass of a user may lack `settings`, which checks ranges
        return cls(**values)
    except ValueError as error:
        raise UserError(_join(path, str(error)) if path else str(error)) from error


def _over_default(field: dataclasses.Field, hint: Any, value: Any, trust: Container[str]) -> Any:
    """Applies settings of a component without a name to the default component, if there is one."""
    if registry_of(hint) is None or not isinstance(value, Mapping) or "name" in value:
        return value
    default = field.default_factory() if callable(field.default_factory) else field.default
    has_default = dataclasses.is_dataclass(default) and not isinstance(default, type)
    return merge(to_dict(default, hint), value, Place(hint, trust, to_dict)) if has_default else value


def _parse_component(registry: Registry, value: Any, path: str, trust: Container[str]) -> Any:
    if isinstance(value, bool) and registry.default is not None:
        return _parse_component(registry, registry.default, path, trust) if value else None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        if value is not None and not isinstance(value, _YAML_VALUES):
            return value  # an object that was given from Python
        raise _wrong_type(path, "{name: ..., ...}", value)
    settings = dict(value)
    name = settings.pop("name", registry.default)
    if not isinstance(name, str):
        raise UserError(f"{path}.name is missing; known {registry.kind}s: {', '.join(registry)}")
    try:
        entry = registry.find(name, trust)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
    component = _component_of(registry, entry, name, settings, path, trust)
    if missing := [attribute for attribute in registry.needs if not hasattr(component, attribute)]:
        raise UserError(f"{path}: {name!r} is no {registry.kind}: it has no {missing[0]!r}")
    return component


def _component_of(
    registry: Registry, entry: Any, name: str, settings: Any, path: str, trust: Container[str]
) -> Any:
    if dataclasses.is_dataclass(entry) and not registry.as_it_is:
        return _parse_dataclass(entry, settings, path, trust)
    if (inspect.isclass(entry) and not registry.as_it_is) or not is_definition(entry):
        kind = "a class" if inspect.isclass(entry) else f"an object of type {type(entry).__name__}"
        wanted = "class" if registry.as_it_is else "dataclass"
        raise UserError(f"{path}: {name!r} must be a function or a {wanted}, got {kind}")
    if settings:
        raise UserError(f"{path}: {name!r} takes no settings, got {', '.join(settings)}")
    return entry


def _named(hint: Any, key: str, value: Any) -> Any:
    """Names the components in a mapping by their keys, unless they say a name themselves."""
    if registry_of(hint) is None or not isinstance(value, Mapping) or "name" in value:
        return value
    return {"name": key, **value}


def _parse_key(hint: Any, key: str, path: str) -> str | int:
    if without_extras(hint) is not int:
        return key
    try:
        return int(key)  # in JSON all keys are texts
    except ValueError:
        raise _wrong_type(f"{path}[{key!r}]", _describe(hint), key) from None


def _parse_optional(choices: tuple[Any, ...], value: Any, path: str, trust: Container[str]) -> Any:
    if value is None and type(None) in choices:
        return None
    inner = [choice for choice in choices if choice is not type(None)]
    problems = []
    for choice in inner:
        try:
            return _parse_value(choice, value, path, trust)
        except Untrusted:
            raise
        except UserError as error:
            problems.append(error)
    raise problems[0] if len(inner) == 1 else _wrong_type(path, " or ".join(map(_describe, inner)), value)


def _parse_sequence(
    origin: Any, arguments: tuple[Any, ...], value: Any, path: str, trust: Container[str]
) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(path, "a list", value)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise UserError(f"{path} must hold {len(arguments)} values, got {len(value)}")
        return tuple(
            _parse_value(h, v, f"{path}[{i}]", trust)
            for i, (h, v) in enumerate(zip(arguments, value, strict=True))
        )
    items = [_parse_value(arguments[0], item, f"{path}[{i}]", trust) for i, item in enumerate(value)]
    return items if origin is list else tuple(items)


def _parse_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _number(value, path)
    if (
        hint is Path and isinstance(value, str | Path) and value != ""
    ):  # an empty path would be the current folder
        return local_path(value, path)
    if hint is Url and isinstance(value, str) and "://" in value:
        return Url(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(path, _describe(hint), value)
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise UserError(f"{path} must have at most {MOST_BITS} bits, got {value.bit_length()}")
    return value


def _number(value: int | str, path: str) -> float:
    """Converts a whole number, or a text such as 1e-4, to a float; `float` would accept ``1_0`` and ``nan``."""
    try:
        number = float(value) if isinstance(value, int) or NUMBER.fullmatch(value) else None
    except OverflowError:
        number = None
    if number is None:
        raise _wrong_type(path, "a number", value)
    return number


def _describe(hint: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
        Url: "a URL",
    }
    hint = without_extras(hint)
    return words.get(hint) or getattr(hint, "__name__", str(hint))


def _wrong_type(path: str, expected: str, value: Any) -> UserError:
    is_number = expected.startswith(("a text", "a path", "a URL")) and isinstance(value, int | float)
    hint = "; in quotes it is a text" if is_number else ""
    return UserError(f"{path} must be {expected}, got {_shown(value, path)}{hint}")


def _shown(value: Any, path: str) -> str:
    """Writes a value in one short line, for an error."""
    try:
        text = repr(without_secrets(value, path))
    except ValueError:  # a whole number that is too long to write
        return "a long number"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
