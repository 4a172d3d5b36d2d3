"""One compiled program of a step: its memory by XLA's own analysis, its costs, and its speed at best."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from hybrid_jax.planning.accelerators import GIB, Accelerator
from hybrid_jax.planning.program_cost import Cost, ProgramCost, program_cost
from hybrid_jax.training.phase import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


@dataclass(frozen=True)
class Memory:
    """The bytes that a program needs on one device, by ``compiled.memory_analysis()``.

    Attributes:
        arguments: bytes of the arguments.
        temporaries: bytes that are allocated for the time of the call.
        outputs: bytes of the results.
        aliases: bytes of results that take the place of donated arguments.
        live: the most bytes in use at one time, as XLA counts them: less than `peak`, since XLA leaves out
            memory that cannot be shared, on a CPU all temporaries.
        host: bytes of all these kinds in the host's memory.
    """

    arguments: float
    temporaries: float
    outputs: float
    aliases: float
    live: float = 0.0
    host: float = 0.0

    @property
    def peak(self) -> float:
        """The bytes that a device must have free: the sum that a TPU's compiler compares with its memory."""
        return self.arguments + self.temporaries + self.outputs - self.aliases


@dataclass(frozen=True)
class Roofline:
    """The least seconds of a program, by formula from published (or measured) peaks."""

    compute: float
    memory: float
    interconnect: float
    network: float = 0.0  # between slices

    @classmethod
    def of(cls, cost: Cost, chip: Accelerator) -> Roofline:
        """Computes each part as if the others cost nothing; the devices of a chip share its peaks.

        A network of unknown speed counts 0 seconds.
        """
        return cls(
            compute=cost.flops * chip.devices / chip.peak_flops,
            memory=cost.bytes * chip.devices / chip.memory_bandwidth,
            interconnect=cost.collective_bytes * chip.devices / chip.interconnect_bandwidth,
            network=cost.between_slices * chip.devices / (chip.network_bandwidth or math.inf),
        )

    @property
    def seconds(self) -> float:
        """The seconds of the slowest part: at best, all of them run at the same time."""
        return max(self.compute, self.memory, self.interconnect, self.network)

    @property
    def bound_by(self) -> str:
        """The name of the slowest part."""
        return max(("compute", "memory", "interconnect", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Step:
    """A program of a phase as it was compiled, or why it could not be."""

    name: str  # "<phase>/<function>"
    tokens: int  # those that one call learns from, scores or samples, on all devices
    compile_seconds: float
    beside: float = 0.0  # bytes of the rest of the run's state, which stay on a device during the call
    memory: Memory | None = None
    cost: ProgramCost | None = None  # of one device
    refused: float | None = None  # bytes that it needs, where the compiler refused it for that
    problem: str | None = None  # the compiler's reason for refusing it

    @property
    def peak(self) -> float | None:
        """The bytes that a device must hold during the call; None where a refusal names no number."""
        needed = self.refused if self.memory is None else self.memory.peak
        return None if needed is None else needed + self.beside

    def fits(self, chip: Accelerator | None) -> bool | None:
        """Tells whether a device can hold it; None where the memory of the device is not known."""
        if self.memory is None:
            return False
        return None if chip is None or self.peak is None else self.peak <= chip.memory_bytes

    def parts(self) -> dict[str, tuple[Cost, int]]:
        """The costs of the parts that follow one another, each with its number of times, by name.

        Sampling has two: the prefill, and a decoded token.
        """
        assert self.cost is not None
        if not self.cost.loops:
            return {"": (self.cost.once, 1)}
        turn = self.cost.looped * (1 / max(self.cost.turns, 1))
        return {"prefill": (self.cost.once, 1), "decode": (turn, self.cost.turns)}

    def seconds(self, chip: Accelerator) -> float | None:
        """The seconds of one call at best; None for a program that could not be compiled."""
        if self.cost is None:
            return None
        return sum(Roofline.of(cost, chip).seconds * times for cost, times in self.parts().values())


def compile_step(program: Program, platform: str) -> Step:
    """Compiles a program for the devices that its arguments lie on; nothing is allocated or run."""
    started = time.perf_counter()
    beside = device_bytes(program.beside)
    try:
        with _uncached():
            compiled = program.function.lower(*program.arguments, **program.settings).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - started
        refused, problem = out_of_memory(str(error))
        return Step(program.name, program.tokens, seconds, beside, refused=refused, problem=problem)
    return Step(
        name=program.name,
        tokens=program.tokens,
        compile_seconds=time.perf_counter() - started,
        beside=beside,
        memory=memory_of(compiled),
        cost=program_cost(compiled.as_text(), platform, program.loop_steps),
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Turns off the persistent cache: it holds no programs for absent devices, and hides compile times."""
    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  pyright does not see it
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX remembers whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def device_bytes(tree: Any) -> float:
    """The bytes of a tree of shapes in the memory of one device."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    sharding = leaf.sharding
    if sharding is None:
        return leaf.size * leaf.dtype.itemsize
    if sharding.memory_kind in ("pinned_host", "unpinned_host"):
        return 0.0
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def memory_of(compiled: Any) -> Memory:
    """Reads the memory that a compiled program needs."""
    analysis = compiled.memory_analysis()
    kinds = ("argument", "temp", "output", "alias")
    sizes = [getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds]
    host = [getattr(analysis, f"host_{kind}_size_in_bytes", 0) for kind in kinds]
    live = getattr(analysis, "peak_memory_in_bytes", 0)
    return Memory(*sizes, live=live, host=host[0] + host[1] + host[2] - host[3])


def out_of_memory(message: str) -> tuple[float | None, str]:
    """Reads a compiler's refusal of too large a program: the bytes that it needs, and one line of text."""
    required = re.search(rf"\({_SIZE}\) exceeds available \w+ \({_SIZE}B?\)", message)
    required = required or re.search(rf"Used {_SIZE}B? of {_SIZE}B? hbm", message)
    if required is None:
        return None, "does not fit: " + " ".join(message.split())[:200]
    needed, available = (float(n) * _UNITS[unit] for n, unit in (required.groups()[:2], required.groups()[2:]))
    return needed, f"does not fit: needs {needed / GIB:.2f} of {available / GIB:.2f} GiB"
