"""Filters: conditions on the fields of a row that leave rows out before anything is made of them.

A condition is a frozen dataclass that is called with a row and says whether to keep it, or a function of the
user's own, ``name: my_module:keep``. A row is what the file or the data set holds: the names are its fields'.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.core.ranges import Natural, settings
from hybrid_jax.core.registry import Registry, suggest

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
Unit = Literal["characters", "words", "items"]
CONDITIONS: Registry[Callable[[Row], bool]] = Registry("condition of a filter", needs=("__call__",))
MATCH_SECONDS = 1.0  # for one pattern in one row; a usual pattern takes microseconds


@settings(kw_only=True)
class OfColumn:
    """The settings of every condition on one column.

    Attributes:
        column: the field of the row.
        keep: false leaves out the rows that meet the condition, and keeps the others.
    """

    column: str
    keep: bool = True

    def __call__(self, row: Row) -> bool:
        """Tells whether to keep the row. A field that it lacks is null."""
        return self.meets(row.get(self.column)) == self.keep

    def meets(self, value: Any) -> bool:
        """Tells whether a value meets the condition."""
        raise NotImplementedError


@CONDITIONS.register("length")
@settings(kw_only=True)
class LengthOf(OfColumn):
    """Rows whose text has between ``least`` and ``most`` characters, words or items; null has none.

    Attributes:
        unit: what is counted. A word is what stands between spaces. A list of messages or texts has the
            characters or words of all of them; its items are its messages.
        least: the fewest to keep.
        most: the most to keep; None is any number.
    """

    unit: Unit = "characters"
    least: Natural = 0
    most: Natural | None = None

    def __post_init__(self) -> None:
        if self.least == 0 and self.most is None:
            raise ValueError("least must be at least 1 where most is None, got 0")
        if self.most is not None and self.least > self.most:
            raise ValueError(f"least must be at most most = {self.most}, got {self.least}")

    def meets(self, value: Any) -> bool:
        """Compares the length of the value with the bounds."""
        size = _size(value, self.unit)
        return self.least <= size and (self.most is None or size <= self.most)


@CONDITIONS.register("one_of")
@settings(kw_only=True)
class OneOf(OfColumn):
    """Rows whose value is one of those that are listed: texts, numbers, true, false or null.

    Attributes:
        values: the list. A text is compared whole, letter by letter; 1 and 1.0 are equal, 1 and true are not.
    """

    values: Annotated[tuple[Any, ...], MinLen(1)]

    def meets(self, value: Any) -> bool:
        """Looks for the value in the list."""
        same_kind = (other for other in self.values if isinstance(other, bool) == isinstance(value, bool))
        return any(value == other for other in same_kind)


@CONDITIONS.register("pattern")
@settings(kw_only=True)
class Pattern(OfColumn):
    """Rows in whose text a regular expression is found; null has no match.

    Attributes:
        pattern: the expression, in the syntax of Python's ``re``, found anywhere in the text: ``^`` and ``$``
            bind it to the ends. A row that takes more than a second ends the run with its place.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern must be a regular expression, got {self.pattern!r}: {error}") from error

    def meets(self, value: Any) -> bool:
        """Searches the text."""
        import regex  # of transformers; unlike re it stops after a time

        if value is None:
            return False
        if not isinstance(value, str):
            raise UserError(f"a pattern needs a text in {self.column!r}, got {shown(value)}")
        try:
            return regex.search(self.pattern, value, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise UserError(
                f"the pattern {self.pattern!r} takes more than {MATCH_SECONDS:g} s in {self.column!r}; make it "
                "simpler: a repeat within a repeat, such as (a+)+, takes exponential time"
            ) from None


@settings(kw_only=True)
class Filtered:
    """A source whose rows can be filtered.

    Attributes:
        filter: conditions that a row must all meet, in this order, before the held-out share is chosen; a line
            of the log counts the rows that each left out. ``module:function`` is a function of a row, a
            mapping of its fields, that returns true or false.
    """

    filter: tuple[Annotated[Any, CONDITIONS], ...] = ()

    def kept(self, rows: Iterable[tuple[str, Row]], name: str) -> Iterator[tuple[str, Row]]:
        """Yields the rows that meet every condition, each with its place; logs the counts at the end.

        Args:
            rows: place and row.
            name: of the file or data set.

        Raises:
            UserError: a condition cannot be applied to a row, no row has its column, or no row is left.
        """
        if not self.filter:
            yield from rows
            return
        left_out, total = [0] * len(self.filter), 0
        fields: set[str] = set()  # of all rows
        for where, row in rows:
            total += 1
            fields |= row.keys()
            failed = next((i for i, rule in enumerate(self.filter) if not _holds(rule, i, row, where)), None)
            if failed is None:
                yield where, row
            else:
                left_out[failed] += 1
        self._report(left_out, total, fields, name)

    def _report(self, left_out: list[int], total: int, fields: set[str], name: str) -> None:
        for number, rule in enumerate(self.filter):
            if total and isinstance(rule, OfColumn) and rule.column not in fields:
                near = suggest(rule.column, fields)
                raise UserError(f"filter[{number}].column: no row of {name} has {rule.column!r}; {near}")
        counts = [f"{n:,} by {_named(rule)}" for n, rule in zip(left_out, self.filter, strict=True)]
        kept = total - sum(left_out)
        line = f"filter kept {kept:,} of {total:,} rows of {name}, left out {', '.join(counts)}"
        if total and not kept:
            raise UserError(f"{line}; loosen a condition")
        log.info(line)


def _holds(rule: Callable[[Row], bool], number: int, row: Row, where: str) -> bool:
    try:
        kept = rule(row)
    except UserError as error:
        raise UserError(f"{where}: filter[{number}]: {error}") from error
    except Exception as error:  # a function of the user's own may raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: filter[{number}] ({_named(rule)}) raises {problem}") from error
    if not isinstance(kept, bool) and type(kept).__name__ != "bool":  # also numpy's
        raise UserError(f"{where}: filter[{number}] must return true or false, got {shown(kept)}")
    return bool(kept)


def _named(rule: Any) -> str:
    """A condition in words: its name and its column."""
    name = CONDITIONS.name_of(rule)
    return f"{name} of {rule.column!r}" if isinstance(rule, OfColumn) else name


def _size(value: Any, unit: Unit) -> int:
    if unit == "items":
        if value is not None and not isinstance(value, list | tuple):
            raise UserError(f"items are counted in a list, got {shown(value)}")
        return len(value or ())
    return sum(len(text) if unit == "characters" else len(text.split()) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value: itself, or those of a list of texts or messages."""
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping) and ({"content", "value", "text"} & value.keys()):
        yield from _texts(next(value[key] for key in ("content", "value", "text") if key in value))
    elif not isinstance(value, Mapping):
        raise UserError(f"the length of a text or a list of messages is counted, got {shown(value)}")
