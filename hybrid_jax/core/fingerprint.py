"""Computes digests of values, of the user's code and of files, the same in every process.

Neither an address in memory nor Python's own `hash` goes into them. They tell whether something has changed;
they hide nothing and prove nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np

WHOLE = 2**28  # bytes; only blocks of a larger file are read
MOST_FILES = 1000
_BLOCK, _BLOCKS = 2**20, 64
Plain = Callable[[Any], Any]
_SIMPLE = (type(None), bool, int, float, str)


def digest(value: Any) -> str:
    """Digests a value into 16 letters: its data, and the source of the code that it calls."""
    return rows_digest([value])


def rows_digest(rows: Iterable[Any]) -> str:
    """Digests values one after the other, since one long text of them all would take a second for 100 MB."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        try:
            text = json.dumps(row, default=_plain)
        except (TypeError, ValueError):  # a key that is not a text
            text = json.dumps(_plain(row))
        found.update(text.encode() + b"\n")
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Digests a file, or all files below a folder; more than `MOST_FILES` files count by their sizes alone.

    A file above `WHOLE` bytes counts by its size and a MiB at 64 places: other weights differ everywhere.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        of_file = file_digest if len(names) <= MOST_FILES else lambda file: str(file.stat().st_size)
        return digest({name: of_file(path / name) for name in names})
    size, found = path.stat().st_size, hashlib.blake2b(digest_size=8)
    found.update(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(_BLOCK):
                found.update(block)
        else:
            for part in range(_BLOCKS):
                file.seek((size - _BLOCK) * part // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def is_own_code(value: Any) -> bool:
    """Tells whether a function, a class or a module is the user's: not of this package or an installed one."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or "builtins"
    if name.partition(".")[0] in ("hybrid_jax", *sys.builtin_module_names):
        return False
    file = getattr(sys.modules.get(name), "__file__", None)  # a notebook has none
    installed = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file is None or not file.startswith(tuple(installed))


def _plain(value: Any, above: tuple[int, ...] = (), told: set[int] | None = None) -> Any:
    """Writes ``value`` as JSON can hold it; an object by what decides how it behaves.

    Args:
        value: anything.
        above: ids of the objects that hold it.
        told: ids of functions and classes that are written out already; later they are only named.
    """
    if isinstance(value, _SIMPLE) and not isinstance(value, enum.Enum):
        return value
    if id(value) in above:  # it holds itself
        return "..."
    told = set() if told is None else told
    go_on = functools.partial(_plain, above=(*above, id(value)), told=told)
    if isinstance(value, dict | MappingProxyType):  # `os.environ` is neither, so its values are left out
        return {"map": [[go_on(key), go_on(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [go_on(item) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(json.dumps(go_on(item)) for item in value)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": _of_bytes(value)}
    if isinstance(value, Path | enum.Enum):
        return str(value)
    if isinstance(value, re.Pattern):
        return {"pattern": [go_on(value.pattern), value.flags]}
    if isinstance(value, np.ndarray | np.generic):
        array = np.ascontiguousarray(value)
        held = array.dtype.hasobject
        content = go_on(array.tolist()) if held else _of_bytes(array.reshape(-1).view(np.uint8).data)
        return {"array": [str(array.dtype), list(array.shape), content]}
    if isinstance(value, functools.partial):
        return {"partial": [go_on(part) for part in (value.func, value.args, value.keywords)]}
    if isinstance(value, MethodType):
        return {"method": [go_on(value.__func__), go_on(value.__self__)]}
    return _plain_code(value, go_on, told)


def _of_bytes(value: bytes | bytearray | memoryview) -> str:
    """Hashes bytes without a copy, since a table may be as large as the memory."""
    return hashlib.blake2b(value, digest_size=16).hexdigest()


def _plain_code(value: Any, go_on: Plain, told: set[int]) -> Any:
    """Writes functions, classes and their instances in plain form."""
    if isinstance(value, ModuleType):
        return {"module": value.__name__}
    definition = _definition(value)
    if isinstance(definition, FunctionType | type):
        if not is_own_code(definition) or id(definition) in told:
            return {"name": f"{definition.__module__}:{definition.__qualname__}"}
        told.add(id(definition))
        is_class = isinstance(definition, type)
        return _plain_class(definition, go_on) if is_class else _plain_function(definition, go_on)
    if dataclasses.is_dataclass(value):
        held: Any = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    else:
        held = getattr(value, "__dict__", {}) if is_own_code(type(value)) else {}
    return {"object": [go_on(type(value)), go_on(held)]}


def _definition(value: Any) -> Any:
    """The function or class behind a compiled or cached one; a wrapper in Python stands for itself."""
    wrapper = callable(value) and not isinstance(value, FunctionType | type)
    return inspect.unwrap(value, stop=lambda inner: isinstance(inner, FunctionType)) if wrapper else value


def _plain_function(function: FunctionType, go_on: Plain) -> dict[str, Any]:
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
    return {
        "source": _source(function) or _compiled(function.__code__),
        "defaults": go_on([function.__defaults__, function.__kwdefaults__]),
        "closure": go_on(held),
        "globals": _globals(function, go_on),
    }


def _plain_class(cls: type, go_on: Plain) -> dict[str, Any]:
    items = {n: getattr(item, "__func__", getattr(item, "fget", item)) for n, item in sorted(vars(cls).items())}
    methods = {name: item for name, item in items.items() if isinstance(item, FunctionType)}
    written = [m for m in methods.values() if m.__code__.co_filename != "<string>"]  # not by `dataclass`
    return {
        "source": _source(cls) or {name: _compiled(method.__code__) for name, method in methods.items()},
        "bases": [go_on(base) for base in cls.__bases__ if is_own_code(base)],
        "globals": [_globals(method, go_on) for method in written if method.__module__ == cls.__module__],
    }


def _globals(function: FunctionType, go_on: Plain) -> dict[str, Any]:
    """Collects the globals that a function uses: other functions, constants, lists of words."""
    names, found = _names(function.__code__), {}
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, ModuleType):
            found[name] = value
        elif is_own_code(value):
            found |= {f"{name}.{n}": getattr(value, n) for n in sorted(names) if hasattr(value, n)}
    return {name: go_on(value) for name, value in found.items() if _is_told(value)}


def _is_told(value: Any) -> bool:
    definition = _definition(value)
    if isinstance(definition, FunctionType | type):
        return is_own_code(definition)
    return not isinstance(value, ModuleType) and (not callable(value) or is_own_code(type(value)))


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _source(definition: Any) -> str | None:
    """The source without comments and layout; None for a lambda, whose lines hold more, or without a file."""
    if getattr(definition, "__name__", "") == "<lambda>":
        return None
    try:
        of = definition.__code__ if isinstance(definition, FunctionType) else definition  # not what it wraps
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(of))))
    except (OSError, TypeError, SyntaxError):
        return None


def _compiled(code: CodeType) -> list[Any]:
    constants = [_compiled(c) if isinstance(c, CodeType) else _plain(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, *map(list, (code.co_names, code.co_varnames, code.co_freevars))]


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
