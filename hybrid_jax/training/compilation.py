"""Counts compiled programs and their seconds, as JAX reports them, and keeps programs between runs."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

from hybrid_jax.core.writing import user_cache

# Lowering to StableHLO, and XLA's work on it (or reading the program from the persistent cache). Tracing is not
# counted: JAX reports a function and those that it calls each with its own overlapping time.
_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILING = "/jax/core/compile/backend_compile_duration"

_MAPS = Path("/proc/self/maps")  # a line for each memory map of this process
_MOST_MAPS = Path("/proc/sys/vm/max_map_count")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """One compiled program."""

    function: str  # the name of the function that was jitted
    seconds: float


class Compilations:
    """The compilations of the whole process since this object was made."""

    def __init__(self):
        _listen()
        self._first = self._taken = len(_compiled)

    @property
    def count(self) -> int:
        """The number of programs."""
        return len(_compiled) - self._first

    @property
    def seconds(self) -> float:
        """The seconds that compiling all of them took."""
        return sum(compiled.seconds for compiled in _compiled[self._first :])

    def new(self) -> list[Compiled]:
        """Returns the programs since the last call."""
        taken, self._taken = self._taken, len(_compiled)
        return _compiled[taken : self._taken]


def summary(compiled: list[Compiled]) -> str:
    """Writes ``learn (3.2 s), copy (0.1 s, 4 programs)``, the longest first."""
    by_function: dict[str, list[float]] = {}
    for program in compiled:
        by_function.setdefault(program.function, []).append(program.seconds)
    longest_first = sorted(by_function.items(), key=lambda item: -sum(item[1]))
    return ", ".join(
        f"{name} ({sum(seconds):.1f} s" + (f", {len(seconds)} programs)" if len(seconds) > 1 else ")")
        for name, seconds in longest_first
    )


def cache_folder() -> Path:
    """The folder where compiled programs are kept between runs, unless a config names another."""
    return user_cache() / "compiled"


def keep_compiled(folder: str | Path | None, *, instead: bool = True) -> None:
    """Keeps compiled programs in a folder from now on, and looks for them there first.

    Args:
        folder: a path, or a URL ``gs://bucket/path``, which JAX opens itself; None changes nothing.
        instead: whether it replaces a folder that JAX was given before.
    """
    told = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  pyright does not see it
    if folder is not None and (instead or told is None):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _count_maps() -> int:
    with _MAPS.open("rb") as maps:
        return sum(1 for _ in maps)


def free_programs(limit: int | None = None) -> bool:
    """Frees all compiled programs once this process has more than ``limit`` memory maps.

    JAX keeps every program that it has compiled. On a CPU each takes tens of memory maps, and a process that
    asks for one map too many dies inside the compiler: a notebook that tries hundreds of settings would get
    there. A program that is needed again is compiled again, or read from the folder of `keep_compiled`. Call
    this where no program is being traced, as between two steps; it costs nothing unless something was compiled
    since the last call.

    Args:
        limit: number of maps; None for half of what the kernel allows. Nothing is done where that is unknown.

    Returns:
        Whether programs were freed.
    """
    global _looked_at, _left
    _listen()
    if limit is None and len(_compiled) == _looked_at:
        return False
    _looked_at = len(_compiled)
    try:
        used = _count_maps()
        # Maps that are not programs remain after a clearing: the limit is half of the others, or else each new
        # program would clear all of them again.
        limit = (int(_MOST_MAPS.read_text()) + _left) // 2 if limit is None else limit
    except (OSError, ValueError):  # no Linux
        return False
    if used <= limit:
        return False
    jax.clear_caches()
    _left = _count_maps()
    log.info("compiled programs took %d memory maps of this process and were freed", used)
    return True


_compiled: list[Compiled] = []
_left = 0  # memory maps that remained after programs were freed
_looked_at = 0  # how many compilations `free_programs` has seen
_lowered: dict[str, float] = {}  # seconds of lowering, until the same function has been compiled
_listens = False


def _listen() -> None:
    global _listens
    if not _listens:
        _listens = True
        jax.monitoring.register_event_duration_secs_listener(_on_duration)


def _on_duration(event: str, duration_secs: float, **kwargs: Any) -> None:
    if event not in (_LOWERING, _COMPILING):
        return
    name = str(kwargs.get("fun_name", "a function"))
    function = re.sub(r"^jit\((.*)\)$", r"\1", name)
    if event == _LOWERING:
        _lowered[function] = _lowered.get(function, 0.0) + duration_secs
    else:
        _compiled.append(Compiled(function, duration_secs + _lowered.pop(function, 0.0)))
