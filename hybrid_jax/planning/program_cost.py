"""Counts what one call of a compiled program costs a device, from its HLO, with all turns of every loop.

XLA's own ``cost_analysis`` counts the body of a loop once, so a scanned model would seem to have one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid_jax.planning.hlo import Computation, Instruction, Module
from hybrid_jax.planning.loops import Value, known_value, turns_of
from hybrid_jax.planning.operations import bytes_between_slices, bytes_sent, collective_kind, flops_of
from hybrid_jax.planning.traffic import Traffic, is_later_part


@dataclass(frozen=True)
class Cost:
    """Work and traffic of one device.

    Attributes:
        flops: of matrix products; element-wise work is not counted, it is bound by memory.
        bytes: read from and written to the main memory.
        collectives: bytes sent to other devices of the slice, by the kind of collective.
        uncounted: library calls whose FLOPs are not known and are missing in ``flops``.
        between_slices: bytes sent to other slices.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, float] = field(default_factory=dict)
    uncounted: frozenset[str] = frozenset()
    between_slices: float = 0.0

    @property
    def collective_bytes(self) -> float:
        """The bytes sent to other devices of the slice, over all kinds of collective."""
        return sum(self.collectives.values())

    def __add__(self, other: Cost) -> Cost:
        kinds = sorted({*self.collectives, *other.collectives})
        sent = {kind: self.collectives.get(kind, 0.0) + other.collectives.get(kind, 0.0) for kind in kinds}
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            sent,
            self.uncounted | other.uncounted,
            self.between_slices + other.between_slices,
        )

    def __mul__(self, times: float) -> Cost:
        sent = {kind: number * times for kind, number in self.collectives.items()}
        return Cost(self.flops * times, self.bytes * times, sent, self.uncounted, self.between_slices * times)


@dataclass(frozen=True)
class OpenLoop:
    """A loop that data may stop early, as decoding does once every row has ended."""

    turns: int  # at most
    body: Cost  # the cost of one turn


@dataclass(frozen=True)
class ProgramCost:
    """The cost of one call: of what runs once, as a prefill does, and of open loops, as decoding is one."""

    once: Cost
    loops: tuple[OpenLoop, ...] = ()

    @property
    def turns(self) -> int:
        """The turns of all open loops together, at most."""
        return sum(loop.turns for loop in self.loops)

    @property
    def looped(self) -> Cost:
        """The cost of all turns of the open loops if none of them stops early."""
        return sum((loop.body * loop.turns for loop in self.loops), Cost())

    @property
    def total(self) -> Cost:
        """The cost of the whole call if no loop stops early."""
        return self.once + self.looped


def program_cost(text: str, platform: str, loop_steps: int = 1) -> ProgramCost:
    """Counts the costs of an optimised program.

    Args:
        text: ``compiled.as_text()``.
        platform: "cpu", "gpu" or "tpu", for which it was compiled.
        loop_steps: turns of a loop that depends on data and shows no bound of its own.
    """
    module = Module.parse(text)
    return _Counter(module, platform, loop_steps).count_entry()


class _Counter:
    def __init__(self, module: Module, platform: str, loop_steps: int):
        self._module, self._loop_steps = module, loop_steps
        self._traffic = Traffic(module, platform)
        self._fused: dict[str, Cost] = {}

    def count_entry(self) -> ProgramCost:
        entry = self._module.computations[self._module.entry]
        return self.count(entry, (None,) * len(entry.parameters))

    def count(self, computation: Computation, parameters: tuple[Value, ...]) -> ProgramCost:
        once, loops = Cost(), []
        for instruction in computation.instructions.values():
            cost = self._instruction(computation, instruction, parameters)
            once, loops = once + cost.once, [*loops, *cost.loops]
        return ProgramCost(once, tuple(loops))

    def _instruction(self, computation, instruction: Instruction, parameters) -> ProgramCost:
        opcode = instruction.opcode
        if opcode == "while":
            return self._while(computation, instruction, parameters)
        if opcode == "conditional":
            return self._conditional(instruction)
        if opcode in ("call", "call-start", "async-start"):
            called = instruction.called("to_apply") or instruction.called("calls") or ""
            return self.count(self._module.computations[called], (None,) * len(instruction.operands))
        if opcode == "fusion":
            fused = self._inside(instruction.called("calls") or "")
            return ProgramCost(fused + Cost(bytes=self._traffic.of(computation, instruction)))
        return ProgramCost(
            self._own(computation, instruction) + Cost(bytes=self._traffic.of(computation, instruction))
        )

    def _while(self, computation, loop: Instruction, parameters) -> ProgramCost:
        state = known_value(self._module, computation, parameters, loop.operands[0])
        turns = turns_of(self._module, loop, state)
        count = self._loop_steps if turns.count is None else turns.count
        parts = (self._module.computations[loop.called(name) or ""] for name in ("body", "condition"))
        body = sum((self.count(part, (turns.invariant,)).total for part in parts), Cost())
        return ProgramCost(Cost(), (OpenLoop(count, body),)) if turns.may_stop else ProgramCost(body * count)

    def _conditional(self, instruction: Instruction) -> ProgramCost:
        """The cost of the branch with the most FLOPs, or with the most bytes where FLOPs are equal."""
        names = instruction.attributes.partition("branch_computations={")[2].partition("}")[0]
        branches = [name.strip(" %") for name in names.split(",") if name]
        branches = branches or [instruction.called(f"{word}_computation") or "" for word in ("true", "false")]
        costs = (self.count(self._module.computations[name], (None,)) for name in branches)
        return max(costs, key=lambda cost: (cost.total.flops, cost.total.bytes))

    def _inside(self, name: str) -> Cost:
        """Counts FLOPs and collectives inside a fusion."""
        if name not in self._fused:
            computation, total = self._module.computations[name], Cost()
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion":
                    total += self._inside(instruction.called("calls") or "")
                elif not is_later_part(computation, instruction):
                    total += self._own(computation, instruction)
            self._fused[name] = total
        return self._fused[name]

    def _own(self, computation: Computation, instruction: Instruction) -> Cost:
        flops = flops_of(computation, instruction)
        if flops is None:
            return Cost(uncounted=frozenset({instruction.text("custom_call_target") or instruction.name}))
        kind = collective_kind(instruction.opcode)
        if kind is None:
            return Cost(flops, between_slices=bytes_between_slices(instruction))
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how a TPU fuses it with the slice that it keeps
        return Cost(collectives={kind: bytes_sent(self._module, computation, instruction, kind)})
