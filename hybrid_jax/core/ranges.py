"""Checks settings against the ranges that are declared on their fields.

    @settings
    class Length:
        target: Count
        scale: Positive | None = None
        clip: tuple[Finite, Finite] = (-1.0, 1.0)
        margin: Annotated[float, Interval(gt=0, lt=0.5)] = 0.1

A range is written with the markers of `annotated_types`. Whatever a field declares, a number is finite and of
a size that a device can hold (`LARGEST`), a text is not empty; a field that means otherwise declares its own
bounds, such as ``Le(math.inf)`` or ``MinLen(0)``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen

T = TypeVar("T")

# int32; products of four such floats are finite in float32
LARGEST = {int: 2**31 - 1, float: 1e9}
_NUMBERS: dict[type, Any] = {int: numbers.Integral, float: numbers.Real}  # with those of numpy
MOST_SEED = 2**32 - 1  # JAX's keys drop the bits above, so a larger seed would repeat a smaller one
SMALLEST = 2.0**-126  # a smaller float is 0 on a device

Finite = Annotated[float, Interval()]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Rate = Annotated[float, Interval(ge=0, lt=1)]  # a rate of dropout or decay
Fraction = Annotated[float, Interval(gt=0, lt=1)]  # a share that divides something into two parts
Seconds = Annotated[float, Interval(gt=0, le=86400)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
# Of models: beyond what anybody has built, and small enough that a mistake ends before time or memory does.
Layers = Annotated[int, Interval(ge=1, le=1024)]
Width = Annotated[int, Interval(ge=1, le=2**20)]  # heads, channels and experts, too
Vocabulary = Annotated[int, Interval(ge=1, le=2**24)]
BatchSize = Annotated[int, Interval(ge=1, le=2**20)]  # rows at once
Order = Annotated[int, Interval(ge=1, le=20)]  # the length of an n-gram
Seed = Annotated[int, Interval(ge=0, le=MOST_SEED)]


@typing.overload
def settings(cls: type[T]) -> type[T]: ...


@typing.overload
def settings(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(cls: Any = None, *, kw_only: bool = False) -> Any:
    """Makes a frozen dataclass that checks the ranges of its fields before it runs its ``__post_init__``."""
    if cls is None:
        return functools.partial(settings, kw_only=kw_only)
    then = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        check_ranges(type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init})
        if then is not None:
            then(self)

    cls.__post_init__ = __post_init__
    return dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)


def check_ranges(cls: Any, values: Mapping[str, Any]) -> None:
    """Checks values of the fields of a dataclass; a field's default always passes.

    Raises:
        ValueError: one is out of its range.
    """
    hints = hints_of(cls)
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = values[field.name]
            try:
                check_range(hints[field.name], value, field.name)
            except ValueError:
                if type(value) is not type(field.default) or value != field.default:
                    raise


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The type hints of a class, with their markers."""
    return typing.get_type_hints(cls, include_extras=True)


def check_range(hint: Any, value: Any, name: str) -> None:
    """Checks the numbers, texts and choices in ``value`` against ``hint``; other types are not checked.

    Raises:
        ValueError: it is out of range.
    """
    origin, arguments, markers = get_origin(hint), get_args(hint), ()
    if origin is Annotated:
        hint, markers = arguments[0], hint.__metadata__
        origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        _check_choices([choice for choice in arguments if choice is not type(None)], value, name)
    elif origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    elif hint in (int, float):
        _check_number(hint, markers, value, name)
    elif isinstance(value, str | Sequence | Mapping):
        _check_items(hint, origin, arguments, markers, value, name)


def _check_choices(choices: list[Any], value: Any, name: str) -> None:
    problems = []
    for choice in choices if value is not None else ():
        if isinstance(value, str) != (choice is str) and (choice is str or get_origin(choice) in (list, tuple)):
            continue  # a bound for another type than that of the value
        try:
            return check_range(choice, value, name)
        except ValueError as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _check_items(hint: Any, origin: Any, arguments: tuple, markers: tuple, value: Any, name: str) -> None:
    least = next((m.min_length for m in markers if isinstance(m, MinLen)), int(hint is str))
    if len(value) < least:
        raise ValueError(f"{name} must not be empty, got {value!r}")
    if isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            check_range(arguments[0], key, f"{name}[{key!r}]")
            check_range(arguments[1], item, f"{name}.{key}")
    elif origin in (list, tuple, Sequence) and not isinstance(value, str):
        inner = arguments if origin is tuple and arguments[-1] is not ... else arguments[:1] * len(value)
        for i, (item_hint, item) in enumerate(zip(inner, value, strict=False)):
            check_range(item_hint, item, f"{name}[{i}]")


def _check_number(kind: type, markers: tuple, value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[kind]):
        raise ValueError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
    bounds = [b for m in markers for b in (m if isinstance(m, GroupedMetadata) else (m,))]
    low = next((b for b in bounds if isinstance(b, Gt | Ge)), None)
    high = next((b for b in bounds if isinstance(b, Lt | Le)), None)
    if not (_holds(low, value) and _holds(high, value)):
        raise ValueError(f"{name} must be {_words(low, high)}, got {_shown(value)}")
    limit = LARGEST[kind]
    if not (_holds(low or Ge(-limit), value) and _holds(high or Le(limit), value)):
        size = "finite" if value != value or abs(value) == math.inf else f"at most {limit:.10g} in size"
        raise ValueError(f"{name} must be {size}, got {_shown(value)}")
    if kind is float and value != 0 and abs(value) < SMALLEST:
        raise ValueError(f"{name} must be 0 or at least {SMALLEST:.2g} in size, got {value}")


def _holds(bound: Any, value: Any) -> bool:
    """Tells whether a value is within a bound. NaN never is; without a bound every value is."""
    match bound:
        case Gt(gt=limit):
            return value > limit
        case Ge(ge=limit):
            return value >= limit
        case Lt(lt=limit):
            return value < limit
        case Le(le=limit):
            return value <= limit
    return True


def _shown(number: Any) -> str:
    return (
        f"one of {number.bit_length()} bits"
        if isinstance(number, int) and abs(number) > 10**20
        else str(number)
    )


def _words(low: Any, high: Any) -> str:
    match low, high:
        case None, Lt(lt=b):
            return f"below {b}"
        case None, Le(le=b):
            return f"at most {b}"
        case Gt(gt=a), None:
            return f"above {a}"
        case Ge(ge=a), None:
            return f"at least {a}"
    start = f"({low.gt}" if isinstance(low, Gt) else f"[{low.ge}"
    return f"in {start}, " + (f"{high.lt})" if isinstance(high, Lt) else f"{high.le}]")
