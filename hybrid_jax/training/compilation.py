"""What is compiled, when, and how long it takes, as JAX itself reports it; and where programs are kept."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

# Lowering to StableHLO, and XLA's work on it (or reading the program from the persistent cache). Tracing is not
# counted: JAX reports a function and those that it calls each with its own overlapping time.
_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILING = "/jax/core/compile/backend_compile_duration"

_MAPS = Path("/proc/self/maps")  # a line for each memory map of this process
_MOST_MAPS = Path("/proc/sys/vm/max_map_count")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compiled:
    """One program."""

    function: str  # the name of the function that was jitted
    seconds: float


class Compilations:
    """All compilations since this was made, of the whole process."""

    def __init__(self):
        _listen()
        self._first = self._taken = len(_compiled)

    @property
    def count(self) -> int:
        return len(_compiled) - self._first

    @property
    def seconds(self) -> float:
        return sum(compiled.seconds for compiled in _compiled[self._first :])

    def new(self) -> list[Compiled]:
        """Those since the last call."""
        taken, self._taken = self._taken, len(_compiled)
        return _compiled[taken : self._taken]


def summary(compiled: list[Compiled]) -> str:
    """``learn (3.2 s), copy (0.1 s, 4 programs)``, the longest first."""
    by_function: dict[str, list[float]] = {}
    for program in compiled:
        by_function.setdefault(program.function, []).append(program.seconds)
    longest_first = sorted(by_function.items(), key=lambda item: -sum(item[1]))
    return ", ".join(
        f"{name} ({sum(seconds):.1f} s" + (f", {len(seconds)} programs)" if len(seconds) > 1 else ")")
        for name, seconds in longest_first
    )


def cache_folder() -> Path:
    """Where compiled programs are kept between runs, unless a config says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hybrid_jax" / "compiled"


def keep_compiled(folder: str | Path | None, *, instead: bool = True) -> None:
    """From now on keeps compiled programs in a folder and looks for them there first.

    Args:
        folder: or a URL ``gs://bucket/path``, which JAX opens itself; None changes nothing.
        instead: whether it replaces a folder that JAX was told before.
    """
    told = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  pyright does not see it
    if folder is not None and (instead or told is None):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _count_maps() -> int:
    with _MAPS.open("rb") as maps:
        return sum(1 for _ in maps)


def free_programs(limit: int | None = None) -> bool:
    """Lets go of all compiled programs once this process has more than ``limit`` memory maps.

    JAX keeps every program that it has compiled. On a CPU each takes tens of memory maps, and a process that
    asks for one map too many dies inside the compiler: a notebook that tries hundreds of settings would get
    there. What is needed again is compiled again, or read from the folder of `keep_compiled`. Call it where no
    program is being traced, as between two steps; it is free unless something was compiled since the last call.

    Args:
        limit: half of what the kernel allows, if None. Where the kernel does not tell, nothing is done.

    Returns:
        Whether programs were let go.
    """
    global _looked_at, _left
    _listen()
    if limit is None and len(_compiled) == _looked_at:
        return False
    _looked_at = len(_compiled)
    try:
        used = _count_maps()
        # What is no program stays: half of the rest, or each program after the first would clear all again.
        limit = (int(_MOST_MAPS.read_text()) + _left) // 2 if limit is None else limit
    except (OSError, ValueError):  # no Linux
        return False
    if used <= limit:
        return False
    jax.clear_caches()
    _left = _count_maps()
    log.info("compiled programs took %d memory maps of this process and were let go", used)
    return True


_compiled: list[Compiled] = []
_left = 0  # memory maps after they were let go
_looked_at = 0  # how many of them `free_programs` has seen
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
