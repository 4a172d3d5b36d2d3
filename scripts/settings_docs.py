"""Writes docs/settings.md and configs/schema.json from the dataclasses that a config consists of.

    python scripts/settings_docs.py

A setting's sentence is its entry under ``Attributes:`` in the docstring of its class, or else the comment
behind its field. Its range is what its annotation declares.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

import annotated_types as at

from hybrid_jax.core.config import Url, to_dict
from hybrid_jax.core.merging import MERGED, registry_of, without_extras
from hybrid_jax.core.ranges import hints_of
from hybrid_jax.core.registry import Registry
from hybrid_jax.experiment_config import ExperimentConfig

ROOT = Path(__file__).parents[1]
DOCS, SCHEMA = ROOT / "docs" / "settings.md", ROOT / "configs" / "schema.json"
OWN_CODE = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"  # my_package.my_module:MyThing
INTRODUCTION = """# Settings

Written by `python scripts/settings_docs.py` from the dataclasses: do not change it by hand.
[configuration](configuration.md) says how a config is put together and which ranges hold everywhere.
A component is written `{name: NAME, setting: value}`, or by its name alone; one of your own has the name
`my_package.my_module:MyThing`. **Bold** settings have no default.
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of one dataclass."""

    name: str
    hint: Any
    field: dataclasses.Field
    sentence: str

    @property
    def is_required(self) -> bool:
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def is_of_machine(self) -> bool:
        """Tells whether a function finds the default on the machine at hand."""
        return (
            inspect.isfunction(self.field.default_factory) and self.field.default_factory.__name__ != "<lambda>"
        )

    @property
    def default(self) -> Any:
        """In the form of a file."""
        factory = self.field.default_factory
        value = self.field.default if factory is dataclasses.MISSING else factory()
        return plain(value, self.hint)


def origin_of(cls: type, name: str) -> type:
    """The class that a setting of ``cls`` is written in: itself, or the nearest one that it inherits from."""
    return next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))


@functools.cache
def parent_of(cls: type) -> tuple[Registry, str] | None:
    """The component that another one inherits its settings from, where a config can name it."""
    for thing in reachable(ExperimentConfig, {}):
        for name in names_of(thing) if isinstance(thing, Registry) else ():
            if thing[name] in cls.__mro__[1:]:
                return thing, name
    return None


def plain(value: Any, hint: Any) -> Any:
    return json.loads(json.dumps(to_dict(value, hint)))


def settings_of(cls: type) -> list[Setting]:
    """The fields of a dataclass that a config can set."""
    hints, found = hints_of(cls), []
    for field in dataclasses.fields(cls):
        if field.init:
            sentences = (sentences_of(base).get(field.name) for base in cls.__mro__ if base is not object)
            found.append(Setting(field.name, hints[field.name], field, next(filter(None, sentences), "")))
    return found


@functools.cache
def sentences_of(cls: type) -> dict[str, str]:
    """The sentences of a class on its fields: under ``Attributes:``, or else in the comments behind them."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    body = cast(ast.ClassDef, ast.parse(source).body[0])
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.line.lstrip().startswith("#")
    }
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return {**found, **_attributes(inspect.cleandoc(cls.__doc__ or ""))}


def _attributes(docstring: str) -> dict[str, str]:
    section = re.search(r"^Attributes:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    entries: dict[str, str] = {}
    for line in section[1].splitlines() if section else ():
        if start := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            entries |= dict.fromkeys(names, start[2])
        elif line.strip():
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
    return entries


def names_of(registry: Registry) -> list[str]:
    """The components that the package itself has registered."""
    return [name for name in registry if registry[name].__module__.startswith("hybrid_jax.")]


def reachable(hint: Any, seen: dict[Any, None]) -> dict[Any, None]:
    """The dataclasses and registries that a config with this type can hold, in the order of reading."""
    registry = registry_of(hint)
    if registry is not None:
        if registry not in seen:
            seen[registry] = None
            for name in names_of(registry):
                if dataclasses.is_dataclass(entry := registry[name]):
                    for setting in settings_of(cast(type, entry)):
                        reachable(setting.hint, seen)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint not in seen:
            seen[hint] = None
            for setting in settings_of(hint):
                reachable(setting.hint, seen)
    else:
        for inner in get_args(hint):
            reachable(inner, seen)
    return seen


def classes() -> list[type]:
    """Every dataclass whose fields are settings of a config."""
    found: dict[type, None] = {}
    for thing in reachable(ExperimentConfig, {}):
        entries = [thing[name] for name in names_of(thing)] if isinstance(thing, Registry) else [thing]
        found |= dict.fromkeys(entry for entry in entries if dataclasses.is_dataclass(entry))
    return [*found]


# The JSON schema


def schema() -> dict[str, Any]:
    """The JSON schema (draft 7) of a config file."""
    definitions: dict[str, Any] = {}
    for cls in classes():
        for setting in settings_of(cls):
            if (origin := origin_of(cls, setting.name)) is not cls:  # written once, for all that inherit it
                definitions[_inherited(origin, setting)] = _property(setting)
    for thing in reachable(ExperimentConfig, {}):
        if isinstance(thing, Registry):
            definitions[_key(thing)] = _any_of_registry(thing)
            definitions |= {_key(thing, name): _component(thing, name) for name in names_of(thing)}
        elif thing is not ExperimentConfig:
            definitions[thing.__name__] = _object(thing)
    top = _object(ExperimentConfig)
    top["properties"] |= {"base": {"type": "string", "description": "a config that this one stands on"}}
    top["patternProperties"] = {r"^[^.]+\..+$": {"description": "a dotted path, as on the command line"}}
    needed = [setting.name for setting in settings_of(ExperimentConfig) if setting.is_required]
    top["if"], top["then"] = {"not": {"required": ["base"]}}, {"required": needed}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of hybrid_jax",
        **top,
        "definitions": definitions,
    }


def _object(cls: Any, **more: Any) -> dict[str, Any]:
    """Required settings are not demanded, for they may stand in a base or in a default."""
    properties = {
        setting.name: _property(setting)
        if (origin := origin_of(cls, setting.name)) is cls
        else _reference(_inherited(origin, setting))
        for setting in settings_of(cls)
    }
    return {
        "type": "object",
        "description": _summary(cls),
        "properties": {**more, **properties},
        "additionalProperties": False,
    }


def _inherited(origin: type, setting: Setting) -> str:
    return f"{origin.__name__}.{setting.name}"


def _component(registry: Registry, name: str) -> dict[str, Any]:
    entry = registry[name]
    if dataclasses.is_dataclass(entry):
        return _object(entry, name={"const": name})
    return {
        "type": "object",
        "description": _summary(entry),
        "properties": {"name": {"const": name}},
        "additionalProperties": False,
    }


def _property(setting: Setting) -> dict[str, Any]:
    default = None if setting.is_required or setting.is_of_machine else setting.default
    name = default.get("name") if isinstance(default, Mapping) else None
    found = _schema_of(setting.hint, default=name, merged=setting.field.metadata.get(MERGED, False))
    if setting.sentence:
        found["description"] = setting.sentence
    if not setting.is_required and not setting.is_of_machine:
        found["default"] = default
    return found


def _schema_of(hint: Any, *, default: str | None = None, merged: bool = False) -> dict[str, Any]:
    """The schema of a value.

    Args:
        hint: its type.
        default: the name of the component that settings without a name change.
        merged: whether null takes an entry of a base away.
    """
    registry, markers = registry_of(hint), getattr(hint, "__metadata__", ())
    if registry is not None:
        return _component_or_its_settings(registry, default or registry.default)
    hint = without_extras(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(choice, default=default) for choice in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (dict, Mapping):
        return _mapping_of(arguments[1], merged)
    if origin is tuple and arguments[-1] is not ...:
        items = [_schema_of(inner) for inner in arguments]
        return {"type": "array", "items": items, "additionalItems": False, "minItems": len(items)}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _schema_of(arguments[0]), **_least_items(markers)}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return {"allOf": [_reference(hint.__name__)]}  # what stands beside a bare $ref does not count
    return _scalar(hint, markers)


def _any_of_registry(registry: Registry) -> dict[str, Any]:
    """A component by its name alone, or as a mapping that names it."""
    names, own = names_of(registry), {"type": "string", "pattern": OWN_CODE}
    settings = [
        {"if": {"properties": {"name": {"const": name}}}, "then": _reference(_key(registry, name))}
        for name in names
    ]
    named = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"anyOf": [{"enum": names}, own]}},
        **({"allOf": settings} if settings else {}),
    }
    switch = [] if registry.default is None else [{"type": "boolean"}]
    return {"anyOf": [{"enum": names}, own, named, *switch]}


def _component_or_its_settings(registry: Registry, default: str | None) -> dict[str, Any]:
    """Settings without a name are those of the ``default``."""
    choices = [
        _reference(_key(registry)),
        *([_reference(_key(registry, default))] if default in names_of(registry) else []),
    ]
    return {"anyOf": choices}


def _mapping_of(hint: Any, merged: bool) -> dict[str, Any]:
    registry, gone = registry_of(hint), [{"type": "null"}] if merged else []
    found: dict[str, Any] = {"type": "object", "additionalProperties": {"anyOf": [_schema_of(hint), *gone]}}
    if registry is not None:  # the key is the name of the component where none is given
        settings = {name: _component_or_its_settings(registry, name)["anyOf"] for name in names_of(registry)}
        found["properties"] = {name: {"anyOf": [*choices, *gone]} for name, choices in settings.items()}
    return found


def _reference(key: str) -> dict[str, Any]:
    return {"$ref": f"#/definitions/{key}"}


def _scalar(hint: Any, markers: tuple) -> dict[str, Any]:
    if hint in (int, float):
        found: dict[str, Any] = {"type": "integer" if hint is int else "number"}
        keys = {at.Ge: "minimum", at.Gt: "exclusiveMinimum", at.Le: "maximum", at.Lt: "exclusiveMaximum"}
        bounds = {keys[type(bound)]: dataclasses.astuple(bound)[0] for bound in bounds_of(markers)}
        return found | {key: value for key, value in bounds.items() if abs(value) != float("inf")}
    if hint is Url:
        return {"type": "string", "pattern": "://"}
    if hint in (str, Path):
        least = next((m.min_length for m in markers if isinstance(m, at.MinLen)), 1)
        return {"type": "string", "minLength": least}
    return {bool: {"type": "boolean"}, type(None): {"type": "null"}}.get(hint, {})


def bounds_of(markers: tuple) -> Iterator[Any]:
    for marker in markers:
        for bound in marker if isinstance(marker, at.GroupedMetadata) else (marker,):
            if isinstance(bound, at.Ge | at.Gt | at.Le | at.Lt):
                yield bound


def _least_items(markers: tuple) -> dict[str, int]:
    return next(({"minItems": m.min_length} for m in markers if isinstance(m, at.MinLen)), {})


def _key(registry: Registry, name: str | None = None) -> str:
    return (registry.kind if name is None else f"{registry.kind} {name}").replace(" ", "_")


# The page


def page() -> str:
    """docs/settings.md."""
    found = [*reachable(ExperimentConfig, {})]
    parts = [thing for thing in found if not isinstance(thing, Registry)]
    registries = sorted((thing for thing in found if isinstance(thing, Registry)), key=lambda r: r.kind)
    contents = " · ".join(f"[{_title(r)}](#{_anchor(_title(r))})" for r in registries)
    text = [INTRODUCTION, f"Components: {contents}\n", "## The experiment\n", *_table(ExperimentConfig)]
    for registry in registries:
        text += [f"## {_title(registry)}\n"]
        for name in names_of(registry):
            text += [f"### {registry.kind} `{name}`\n", *_described(registry[name])]
    text += ["## Settings inside others\n"]
    for cls in sorted((cls for cls in parts if cls is not ExperimentConfig), key=lambda cls: cls.__name__):
        text += [f"### {cls.__name__}\n", *_described(cls)]
    return "\n".join(text)


def _described(entry: Any) -> list[str]:
    return [_summary(entry) + "\n", *(_table(entry) if dataclasses.is_dataclass(entry) else [])]


def _table(cls: Any) -> list[str]:
    rows, parent, lead = settings_of(cls), parent_of(cls), []
    if parent is not None:  # what it has from another component is described there
        rows = [row for row in rows if origin_of(cls, row.name) not in parent[0][parent[1]].__mro__]
        title = f"{parent[0].kind} `{parent[1]}`"
        lead = [f"The settings of [{title}](#{_anchor(title)})" + (", and:\n" if rows else ".\n")]
    if not rows:
        return lead
    lines = ["| setting | takes | default | |", "|---|---|---|---|"]
    for setting in rows:
        name = f"**{setting.name}**" if setting.is_required else setting.name
        cells = (name, words(setting.hint), _default(setting), setting.sentence)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lead, *lines, ""]


def _default(setting: Setting) -> str:
    if setting.is_required:
        return ""
    if setting.is_of_machine:
        return "this machine's"
    value = setting.default
    if isinstance(value, Mapping) and "name" in value and registry_of_default(setting.hint) is not None:
        changed = _changed(cast(Registry, registry_of_default(setting.hint)), value)
        value = {"name": value["name"], **changed} if changed else value["name"]
    elif isinstance(value, Mapping) and dataclasses.is_dataclass(without_extras(setting.hint)):
        return "its defaults"
    return f"`{_yaml(value)}`"


def registry_of_default(hint: Any) -> Registry | None:
    """The registry of a hint, or of the one choice in it that has one."""
    return registry_of(hint) or next((r for inner in get_args(hint) if (r := registry_of(inner))), None)


def _changed(registry: Registry | None, value: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which a default component differs from its class."""
    entry = registry[value["name"]] if registry is not None and value["name"] in registry else None
    usual = (
        {}
        if entry is None
        else {s.name: s.default for s in settings_of(entry) if not s.is_required and not s.is_of_machine}
    )
    return {key: inner for key, inner in value.items() if key != "name" and usual.get(key, ...) != inner}


def _yaml(value: Any) -> str:
    """A value in one line, as a config would have it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def words(hint: Any) -> str:
    """The values that a setting takes, in words."""
    registry, markers = registry_of(hint), getattr(hint, "__metadata__", ())
    if registry is not None:
        return f"a [{registry.kind}](#{_anchor(_title(registry))})"
    hint = without_extras(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(choice) for choice in arguments)
    if origin is Literal:
        return " · ".join(f"`{_yaml(choice)}`" for choice in arguments)
    if origin in (dict, Mapping):
        return f"a mapping of {'numbers' if arguments[0] is int else 'names'} to {words(arguments[1])}"
    if origin is tuple and arguments[-1] is not ...:
        return "[" + ", ".join(map(words, arguments)) + "]"
    if origin in (list, tuple, Sequence):
        return f"a list of {words(arguments[0])}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#{_anchor(hint.__name__)})"
    known = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Path: "a path",
        Url: "a URL",
    }
    range_ = _range(markers)
    return {type(None): "null", Any: "anything"}.get(hint, known.get(hint, "anything")) + (
        f" {range_}" if range_ else ""
    )


def _range(markers: tuple) -> str:
    bounds = {type(bound): dataclasses.astuple(bound)[0] for bound in bounds_of(markers)}
    signs = ((at.Gt, ">"), (at.Ge, "≥"), (at.Lt, "<"), (at.Le, "≤"))
    return ", ".join(f"{sign} {_number(bounds[kind])}" for kind, sign in signs if kind in bounds)


def _number(value: float) -> str:
    for more, words_ in ((0, ""), (1, " − 1")):
        power = (value + more).bit_length() - 1 if isinstance(value, int) and value > 2**15 else 0
        if power and value + more == 2**power:
            return f"2^{power}{words_}"
    return f"{value:.10g}".replace("inf", "∞")


def _summary(entry: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(entry.__doc__ or "").split("\n\n")[0].split()).replace("``", "`")


def _title(registry: Registry) -> str:
    """Its kind, in the plural."""
    first, *rest = registry.kind.split(" of ", 1)
    return " of ".join((f"{first[0].upper()}{first[1:]}s", *rest))


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main() -> None:
    DOCS.write_text(page())
    SCHEMA.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
