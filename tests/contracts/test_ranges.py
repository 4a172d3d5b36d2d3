"""Every setting of every component × 24 values: what is accepted is what its declared range says."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
import pytest

from hybrid_jax.core.config import Url, parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import Registry
from hybrid_jax.experiment_config import ExperimentConfig
from hybrid_jax.models.pooling import Pooling
from hybrid_jax.training.loss_scale import DynamicLossScale

NAN, INF = math.nan, math.inf
VALUES = (
    *(NAN, INF, -INF, -1, 0, 1, 0.5, -0.5, 1.5, 1e30, -1e30, 10**30, 2**31, 2**63),
    *("", "x", "nan", "1e-4", None, True, [], {}, [1], [-1]),
)
# Needed beside the required settings, or instead of what `example` would give.
GIVEN: dict[str, dict[str, Any]] = {
    "Demonstrations": {"environment": {"name": "booking"}},
    "Distillation": {"references": {"teacher": {}}},
    "OnlinePreference": {"reward": {"parts": {"1": {"reward": {"name": "length", "target": 1}}}}},
    "LengthOf": {"least": 1},
    "Guidance": {"value": "a"},
    "TreeSearch": {"value": "a"},
    "User": {"answered_by": "a"},
    "Gymnasium": {"id": "a"},
    "SkyRLGym": {"id": "a"},
    "TRL": {"factory": object},
    "OneOf": {"values": [1]},
    "Bandit": {"metric": "sft/loss"},
    "Endpoint": {"url": "https://example.com/v1", "model": "m"},
    "ClassificationHead": {"labels": ["a", "b"]},
    "TextEncoderConfig": {"path": "a"},
    "Limit": {"at_most": 0.5},
    "Triggered": {"below": 0.5},
    "JsonSchema": {"schema": {}},
    "Alternation": {"cycle": {"1": 1}},
    "PreferenceExamples": {"source": {"name": "jsonl", "train": "a"}},
    "Gated": {"preferences": {"name": "jsonl", "train": "a"}},
    "ExperimentConfig": {
        "model": "decoder",
        "tokenizer": "bytes",
        "data": "restaurants",
        "phases": {"1": {"name": "sft"}},
        "scheduler": {"name": "alternation", "cycle": {"1": 1}},
    },
}


def components(hint: Any, seen: dict[type, None]) -> dict[type, None]:
    """All dataclasses that a config can hold, by the type hints and the registries in them."""
    registry = registry_of(hint)
    if registry is not None:
        for name in registry:
            components(registry[name], seen)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint not in seen:
            seen[hint] = None
            for _, inner in settings_of(hint):
                components(inner, seen)
    else:
        for inner in get_args(hint):
            components(inner, seen)
    return seen


def settings_of(cls: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return ((field, hints[field.name]) for field in dataclasses.fields(cls) if field.init)


def registry_of(hint: Any) -> Registry | None:
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Registry)), None)


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


COMPONENTS = [*components(ExperimentConfig, {}), DynamicLossScale, Pooling]


def example(cls: type) -> dict[str, Any]:
    """Settings with which the component can be parsed."""
    given = GIVEN.get(cls.__name__, {})
    needed = [(f.name, hint) for f, hint in settings_of(cls) if is_required(f) and f.name not in given]
    return {name: example_of(hint) for name, hint in needed} | given


def example_of(hint: Any) -> Any:
    if (registry := registry_of(hint)) is not None:
        name = next(
            name for name in registry if not any(is_required(f) for f, _ in settings_of(registry[name]))
        )
        return {"name": name}
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Annotated, Union, types.UnionType, tuple):
        return [example_of(inner[0])] if origin is tuple else example_of(inner[0])
    if origin in (dict, Mapping):
        return {"1": example_of(inner[1])}
    if dataclasses.is_dataclass(hint):
        return example(typing.cast(type, hint))
    return {int: 300, float: 0.25, str: "a", Path: "a"}[hint]


def expected(hint: Any, value: Any) -> bool:
    """Whether a setting with this hint takes a value: the declaration read once more, by other means."""
    if (registry := registry_of(hint)) is not None:
        # No text in `VALUES` names a component: the one that a registry takes without a name is left.
        return (value is True or value == {}) and registry.default is not None
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if not get_origin(inner[0]):
            return scalar(inner[0], value, hint.__metadata__)
        return expected(inner[0], value) and all(len(value) >= m.min_length for m in hint.__metadata__)
    if origin in (Union, types.UnionType):
        return any(value is None if choice is type(None) else expected(choice, value) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (tuple, list):
        fits = isinstance(value, list) and (inner[-1] is ... or len(value) == len(inner))
        return fits and all(expected(inner[0], item) for item in value)
    if origin in (dict, Mapping):
        return value == {}
    if dataclasses.is_dataclass(hint):
        return value == {} and not any(is_required(field) for field, _ in settings_of(hint))
    return scalar(hint, value, ())


def accepts(field: dataclasses.Field, hint: Any, value: Any) -> bool:
    """`expected` of a field; settings without a name, here none, change nothing of a default component."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    is_component = dataclasses.is_dataclass(default) and not isinstance(default, type)
    return (is_component and value == {}) or expected(hint, value)


def scalar(kind: Any, value: Any, markers: tuple) -> bool:
    if kind is str or kind is Path:
        least = next((m.min_length for m in markers if isinstance(m, at.MinLen)), 1)
        return isinstance(value, str) and len(value) >= least
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return (whole or (kind is float and isinstance(value, float))) and in_range(kind, value, markers)
    return {bool: isinstance(value, bool), Any: True, Url: False}[kind]


def in_range(kind: type, value: Any, markers: tuple) -> bool:
    limits = {name: None for name in ("gt", "ge", "lt", "le")}
    for marker in markers:
        limits.update(
            {name: getattr(marker, name) for name in limits if getattr(marker, name, None) is not None}
        )
    largest = 2**31 - 1 if kind is int else 1e9
    if limits["gt"] is limits["ge"] is None:
        limits["ge"] = -largest
    if limits["lt"] is limits["le"] is None:
        limits["le"] = largest
    holds = {"gt": float.__gt__, "ge": float.__ge__, "lt": float.__lt__, "le": float.__le__}
    return all(holds[name](float(value), float(limit)) for name, limit in limits.items() if limit is not None)


def numeric_hints(hint: Any, markers: tuple = ()) -> Iterator[tuple[type, tuple]]:
    """The ints and floats of a type hint, each with its markers."""
    if hint in (int, float):
        yield hint, markers
    elif get_origin(hint) is Annotated:
        if registry_of(hint) is None:
            yield from numeric_hints(get_args(hint)[0], hint.__metadata__)
    else:
        for inner in get_args(hint):
            yield from numeric_hints(inner)


@pytest.mark.parametrize("cls", COMPONENTS, ids=lambda cls: cls.__name__)
def test_a_setting_takes_what_its_range_declares_and_nothing_else(cls):
    base = example(cls)
    parse(cls, base, "here")  # without the setting under test all is well
    wrong = []
    for field, hint in settings_of(cls):
        for value in VALUES:
            try:
                parse(cls, {**base, field.name: value}, "here")
                refused = None
            except UserError as error:
                refused = str(error)
                assert "\n" not in refused
                assert refused.startswith("here")
            if refused is not None and accepts(field, hint, value) and "__post_init__" in vars(cls):
                continue  # by a rule on several settings
            if (refused is None) != accepts(field, hint, value):
                wrong.append((field.name, value, refused))
    assert wrong == []


@pytest.mark.parametrize("cls", COMPONENTS, ids=lambda cls: cls.__name__)
def test_every_number_has_a_declared_range_that_is_checked_for_components_from_python_too(cls):
    component = parse(cls, example(cls), "here")
    for field, hint in settings_of(cls):
        numbers = list(numeric_hints(hint))
        assert all(markers for _, markers in numbers), f"{field.name} declares no range"
        if numbers and isinstance(getattr(component, field.name), int | float):
            with pytest.raises(ValueError, match=f"^{field.name} must be "):
                dataclasses.replace(component, **{field.name: NAN})
