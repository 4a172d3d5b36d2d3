"""Calls of a user's function: every argument is passed by its name, never by its place.

A reward takes ``prompts``, ``responses`` (or the same texts as ``completions``), and the data's columns that it
names; ``**columns`` takes whatever else there is. A name that could mean anything else is refused, since
swapped texts would give plausible but wrong scores.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESPONSES = ("responses", "completions")  # two names of the same texts
TEXTS = ("prompts", *RESPONSES)  # these are never columns
TOKENS = ("tokens", "attention_mask", "response_mask")

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Arguments:
    """The names that a reward takes.

    Attributes:
        by_place: Names of positional-only parameters, in order.
        by_name: Names of all others.
        required: Those of both that have no default.
        bound: Names that `functools.partial` has filled: no column replaces what it holds.
        takes_rest: Whether it has ``**columns``.
    """

    by_place: tuple[str, ...]
    by_name: tuple[str, ...]
    required: frozenset[str]
    bound: frozenset[str]
    takes_rest: bool

    @classmethod
    def of(cls, reward: Callable[..., Any]) -> Arguments:
        """Reads which names ``reward`` takes.

        Raises:
            ValueError: the names cannot be read, the first one is not a text's, or none is for the responses.
        """
        if inspect.iscoroutinefunction(reward):
            raise ValueError(
                "must be a plain function, got one with async: call asyncio.run in it where it waits"
            )
        parameters = _parameters(reward)
        bound = frozenset(reward.keywords) if isinstance(reward, functools.partial) else frozenset()
        named = [p for p in parameters if p.kind in _NAMED and p.name not in bound]
        takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        first = next((p.name for p in named if p.kind in _POSITIONAL), None)
        if first is None and any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            raise _wrong(parameters, "*args has no names (functools.wraps keeps those of a decorated function)")
        if first is not None and first not in TEXTS:
            raise _wrong(parameters, f"its first argument is {first!r}")
        if not takes_rest and not any(p.name in RESPONSES for p in named):
            raise _wrong(parameters, "it does not take the responses")
        return cls(
            tuple(p.name for p in named if p.kind is inspect.Parameter.POSITIONAL_ONLY),
            tuple(p.name for p in named if p.kind is not inspect.Parameter.POSITIONAL_ONLY),
            frozenset(p.name for p in named if p.default is inspect.Parameter.empty),
            bound,
            takes_rest,
        )

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The columns that it cannot be called without."""
        return tuple(n for n in (*self.by_place, *self.by_name) if n in self.required and n not in TEXTS)

    def fill(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Makes the arguments of a call: by place, and by name.

        ``**columns`` receives all other columns, and each of the texts that no parameter names.
        """
        texts = {"prompts": list(prompts), **{name: list(responses) for name in RESPONSES}}
        known = {**columns, **texts}
        places = []
        for name in self.by_place:
            if name not in known:
                break  # the defaults of this one and of those behind it
            places.append(known[name])
        taken = {name: known[name] for name in self.by_name if name in known}
        if self.takes_rest:
            names = {*self.by_place, *self.by_name, *self.bound}
            named = names | set(RESPONSES) if names & set(RESPONSES) else names
            taken |= {name: value for name, value in known.items() if name not in named}
        return places, taken


def check_places(function: Callable[..., Any], names: Sequence[str]) -> None:
    """Checks that a function which is called by place has none of ``names`` in the wrong place.

    Raises:
        ValueError: It has.
    """
    try:
        found = [p.name for p in _parameters(function) if p.kind in _POSITIONAL]
    except ValueError:  # no names, no order of them
        return
    if any(name in names and names.index(name) != place for place, name in enumerate(found)):
        raise ValueError(f"must take ({', '.join(names)}), in this order, got ({', '.join(found)})")


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C, or not callable
        raise ValueError(
            f"must take (prompts, responses, **columns), got {function!r}, whose arguments have no names that "
            "can be read: call it in a function of your own"
        ) from None


def _wrong(parameters: Sequence[inspect.Parameter], reason: str) -> ValueError:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    got = ", ".join(stars.get(p.kind, "") + p.name for p in parameters)
    return ValueError(
        f"must take (prompts, responses, **columns) by these names, or completions for responses, got ({got}): "
        f"{reason}"
    )
