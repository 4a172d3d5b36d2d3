"""Reads YAML strictly, as people mean it, within bounds of time and memory.

PyYAML reads YAML 1.1, in which ``no`` is false, ``1:30`` is 90, ``010`` is 8, ``1_000`` is 1000, ``2026-01-01``
is a date and ``1e-4`` is a text. Here, as in YAML 1.2, only ``true`` and ``false`` are truth values and numbers
are plain decimals (or ``0x1f``, ``0o17``); all else is a text, which a setting that wants a number refuses. A
key that stands twice is an error, and so is what would grow without bound: deep nesting, aliases of aliases,
long numbers.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import MEBIBYTE, read_text

MOST_BYTES = MEBIBYTE  # in a file
MOST_VALUES = 30_000  # with every alias written out
MOST_LEVELS = 50
MOST_BITS = 63  # in a whole number

_TAG = "tag:yaml.org,2002:"
_PLAIN = {  # by kind, what a text without quotes must look like, and the characters that it may begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
NUMBER = re.compile(_PLAIN["float"][0])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        UserError: it is not a regular file, too large, not YAML or not a mapping; with the line if known.
    """
    settings = parse_yaml(read_text(path, MOST_BYTES, "config file"), str(path))
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a mapping of settings, got {type(settings).__name__}")
    return settings


def parse_yaml(text: str, where: str) -> Any:
    """Reads the value of a YAML text.

    Args:
        text: one document.
        where: what to call it in an error.

    Raises:
        UserError: it is not YAML, or uses a part of YAML that is refused here.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        kind = "" if isinstance(error, _Refused) else "not YAML: "
        raise UserError(f"{where}{line}: {kind}{problem}") from error
    except ValueError as error:  # an escape for a character that does not exist
        raise UserError(f"{where}: not YAML: {error}") from error


def dump_yaml(settings: Any, *, unicode: bool = False) -> str:
    """YAML that `parse_yaml` reads back, and PyYAML too: what either takes for a number stands in quotes.

    Args:
        settings: plain values.
        unicode: leaves letters beyond ASCII as they are.
    """
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=unicode)


class _Refused(yaml.MarkedYAMLError):
    """Raised for a part of YAML that is refused here."""

    def __init__(self, node: Any, problem: str):
        super().__init__(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  PyYAML keeps them so

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._composed = 0
        self._known: dict[int, tuple[int, int]] = {}  # by node, how many nodes and levels it has
        self._open: set[int] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > MOST_LEVELS:
            raise _Refused(self.peek_event(), f"nested deeper than {MOST_LEVELS} levels")
        if self._composed > MOST_VALUES:
            raise _Refused(self.peek_event(), f"more than {MOST_VALUES:,} values")
        self._depth, self._composed = self._depth + 1, self._composed + 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._measure(node)
        return node

    def _measure(self, node: Node) -> tuple[int, int]:
        """Counts the nodes and levels below a node, looking at each part only once."""
        if id(node) in self._open:
            raise _Refused(node, "an alias holds itself")
        if id(node) in self._known:
            return self._known[id(node)]
        self._check_tag(node)
        children = []
        if isinstance(node, MappingNode):
            _check_keys(node)
            children = [part for pair in node.value for part in pair]
        elif not isinstance(node, ScalarNode):
            children = node.value
        self._open.add(id(node))
        measured = [self._measure(child) for child in children]
        self._open.remove(id(node))
        size = 1 + sum(nodes for nodes, _ in measured)
        levels = 1 + max((levels for _, levels in measured), default=0)
        if size > MOST_VALUES or levels > MOST_LEVELS + 1:
            raise _Refused(node, f"aliases make more than {MOST_VALUES:,} values or {MOST_LEVELS} levels of it")
        self._known[id(node)] = size, levels
        return size, levels

    def _check_tag(self, node: Node) -> None:
        plain = (True, False) if isinstance(node, ScalarNode) else True
        if node.tag not in (f"{_TAG}str", self.resolve(type(node), node.value, plain)):
            raise _Refused(node, f"the tag {node.tag.replace(_TAG, '!!')} is not read")

    def construct_yaml_int(self, node: Any) -> int:
        digits = len(node.value)
        value = super().construct_yaml_int(node) if digits < 100 else None
        if value is None or value.bit_length() > MOST_BITS:
            raise _Refused(node, f"a whole number must have at most {MOST_BITS} bits, got {digits} digits")
        return value

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        if math.isinf(value) and "inf" not in node.value.lower():
            raise _Refused(node, f"{node.value[:20]} is too large a number")
        return value


def _check_keys(node: MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refused(key, "a key must be a word")
        if key.value in seen:
            raise _Refused(key, f"the key {key.value!r} is there twice")
        seen.add(key.value)


class _Dumper(yaml.SafeDumper):
    pass


for _kind, (_pattern, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))
