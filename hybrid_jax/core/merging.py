"""Merges the settings of a config file, its base and the command line, guided by the type hints.

Settings merge: of a dataclass or a component, what is not named stays; naming another component drops the
settings of the old one. Collections are replaced: a mapping of entries under names of the user's own (every
field of type ``dict`` or ``Mapping``: reward parts, the phases of a cycle, references, judges) holds what it
says and no more, for each of its entries takes effect. ``a.b.c=value`` reaches into one entry and leaves the
others; null there removes it. Only a field with the metadata `MERGED` is merged by name all the same.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import Registry, suggest

MERGED = "merged"  # key of a field's metadata
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A place in the settings, with the type that belongs there.

    Attributes:
        hint: the type of the value.
        trust: names that may be imported to learn the type of a component.
        plain: brings a default into the form of a file (`config.to_dict`).
        key: under which the value stands, which names a component in a collection.
        default: of the value, in the form of a file; None where there is none.
        merged: it is a collection whose mappings merge.
    """

    hint: Any
    trust: Container[str]
    plain: Callable[[Any, Any], Any]
    key: str | None = None
    default: Any = None
    merged: bool = False

    @property
    def registry(self) -> Registry | None:
        """The registry that the component here comes from; None where there is no component."""
        return registry_of(self.hint)

    @property
    def is_collection(self) -> bool:
        """Tells whether entries under names of the user's own stand here."""
        return get_origin(without_extras(self.hint)) in (dict, Mapping)

    def child(self, key: str, settings: Settings) -> Place:
        """The place of ``key`` within ``settings``, which stand at this place."""
        hint = without_extras(self.hint)
        if self.is_collection:
            return self._place(get_args(hint)[1], key=key)
        cls = self._component(settings) if self.registry is not None else hint
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}
        if key not in fields:
            return self._place(Any)
        hint, field = typing.get_type_hints(cls, include_extras=True)[key], fields[key]
        factory = field.default_factory
        default = None if factory is dataclasses.MISSING else factory()
        default = default if field.default is dataclasses.MISSING else field.default
        return self._place(hint, default=self.plain(default, hint), merged=field.metadata.get(MERGED, False))

    def named(self, value: Any) -> Any:
        """Writes a component in its long form, a mapping with its name."""
        if self.registry is None:
            return value
        if value is True and self.registry.default is not None:
            value = self.registry.default
        return {"name": value} if isinstance(value, str) else value

    def name(self, settings: Settings) -> Any:
        """The name of the component that settings here describe: their own, the default's, or the key."""
        default = self.default.get("name") if isinstance(self.default, Mapping) else None
        of_registry = None if self.registry is None else self.registry.default
        return settings.get("name", default or self.key or of_registry)

    def _place(self, hint: Any, **more: Any) -> Place:
        return Place(without_none(hint), self.trust, self.plain, **more)

    def _component(self, settings: Settings) -> Any:
        try:
            return self.registry.find(str(self.name(settings)), self.trust)  # type: ignore
        except UserError:  # `parse` will say so
            return None


def merge(old: Any, new: Any, place: Place) -> Any:
    """Merges ``new`` over ``old``."""
    new = place.named(new) if isinstance(place.named(old), Mapping) else new
    old = place.named(old)
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        return new
    if place.is_collection and not place.merged:
        return new
    if place.registry is not None or "name" in old:  # a component without a registry has a name
        name = place.name(old)
        if new.get("name", name) != name:
            return new
    merged = dict(old)
    for key, value in new.items():
        if value is None and place.is_collection and key in merged:
            del merged[key]
        else:
            merged[key] = merge(merged.get(key), value, place.child(key, merged))
    return merged


def put(settings: Settings, path: Sequence[str], value: Any, place: Place, before: str = "") -> dict[str, Any]:
    """Puts ``value`` at a dotted ``path`` into a copy of ``settings``.

    Raises:
        UserError: null is put in place of an entry that a collection does not have.
    """
    key, *rest = path
    key = next((known for known in settings if str(known) == key), key)  # 5 for "5"
    dotted, child = f"{before}{key}", place.child(key, settings)
    if rest:
        inner = child.named(settings.get(key))
        if inner is None and child.is_collection:
            inner = child.default  # else one entry would replace all entries of the default
        inner = inner if isinstance(inner, Mapping) else {}
        return {**settings, key: put(inner, rest, value, child, f"{dotted}.")}
    if value is None and place.is_collection:
        if key not in settings:
            raise UserError(f"{dotted}=null removes nothing; {suggest(key, [str(k) for k in settings])}")
        return {known: entry for known, entry in settings.items() if known != key}
    return {**settings, key: merge(settings.get(key), value, child)}


def registry_of(hint: Any) -> Registry | None:
    """The registry that a field's component comes from, if it holds one."""
    return next((extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Registry)), None)


def without_extras(hint: Any) -> Any:
    """Strips what `typing.Annotated` adds from a hint."""
    return get_args(hint)[0] if get_origin(hint) is typing.Annotated else hint


def without_none(hint: Any) -> Any:
    """Strips None from the hint of an optional value; of several types, picks the one that a mapping can be."""
    bare = without_extras(hint) if registry_of(hint) is None else hint
    if get_origin(bare) not in (Union, types.UnionType):
        return hint
    choices = [choice for choice in get_args(bare) if choice is not type(None)]
    mappings = [
        choice
        for choice in choices
        if registry_of(choice) is not None
        or dataclasses.is_dataclass(without_extras(choice))
        or get_origin(without_extras(choice)) in (dict, Mapping)
    ]
    return next(iter(mappings or choices))
