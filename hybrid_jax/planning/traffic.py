"""Bytes that an instruction of a compiled program moves to and from a device's main memory.

A fusion reads its operands and writes its results once; what is between them stays in registers. Of an operand
that it only takes slices of, the slices count; of a result that is an operand with a part replaced, the part.
On a TPU arrays in other memories (``S(1)`` is the vector memory on the chip) cost nothing here.
"""

from __future__ import annotations

from hybrid_jax.planning.hlo import Computation, Instruction, Module, Shape

FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"),
        *("while", "conditional", "call", "opt-barrier", "partition-id", "replica-id", "domain"),
        *("async-start", "async-update", "call-start", "recv", "send"),
    }
)
_FREE_CALLS = frozenset(
    {
        *("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"),
        *("PrepareAsyncCallStart", "PrepareAsyncCallDone"),
    }
)
_SEEN_THROUGH = frozenset({"bitcast", "convert", "reshape", "transpose", "copy"})
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
COLLECTIVES = frozenset(
    {
        *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
        *("collective-permute", "collective-broadcast"),
    }
)


class Traffic:
    """Counts bytes for one module; ``platform`` says which memories are the main one."""

    def __init__(self, module: Module, platform: str):
        self._module = module
        self._is_tpu = platform == "tpu"

    def of(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes read and written by an instruction that is not inside a fusion."""
        opcode, operands = instruction.opcode, computation.operands(instruction)
        is_free = opcode in FREE or opcode.endswith("-done")
        if is_free or instruction.text("custom_call_target") in _FREE_CALLS:
            return 0.0
        if opcode == "fusion":
            return self._fusion(computation, instruction)
        if opcode == "slice-start":
            return self._slice_start(computation, instruction)
        if opcode.endswith("-start") and opcode != "all-reduce-start":  # its tuple holds operands and results
            return sum(map(self._bytes, instruction.shapes))
        if opcode in _SLICES:
            return sum(map(self._bytes, instruction.shapes)) * 2
        if opcode == "dynamic-update-slice":
            return 2 * self._bytes(operands[1].shapes[0])
        if opcode == "scatter":
            return self._scatter(computation, instruction)
        return sum(map(self._bytes, (*computation.operand_shapes(instruction), *instruction.shapes)))

    def _bytes(self, shape: Shape) -> float:
        return shape.bytes if self._is_main(shape) else 0.0

    def _is_main(self, shape: Shape) -> bool:
        return shape.space == 0 or (not self._is_tpu and shape.space != 5)  # 5 is the host's

    def _slice_start(self, computation: Computation, instruction: Instruction) -> float:
        source, result = computation.operand_shapes(instruction)[0], instruction.shapes[-2]
        return result.bytes * (self._is_main(source) + self._is_main(result))

    def _scatter(self, computation: Computation, instruction: Instruction) -> float:
        """Reads updates and indices, reads and writes the places that they go to."""
        count = len(instruction.shapes)
        shapes = computation.operand_shapes(instruction)[count:]
        return sum(map(self._bytes, shapes)) + 2 * sum(map(self._bytes, shapes[1:]))

    def _fusion(self, computation: Computation, instruction: Instruction) -> float:
        called = self._module.computations[instruction.called("calls") or ""]
        total = 0.0
        for index, operand in enumerate(computation.operands(instruction)):
            if len(operand.shapes) == 1 and self._is_main(operand.shapes[0]):
                total += self._read(called, index)
        written = self._written(called, called.root)
        if len(written) != len(instruction.shapes):
            written = [shape.bytes for shape in instruction.shapes]
        return total + sum(w for w, s in zip(written, instruction.shapes, strict=True) if self._is_main(s))

    def _read(self, called: Computation, index: int) -> float:
        """Counts the bytes that a fusion reads of an operand."""
        parameter = called.parameters[index]
        shape = parameter.shapes[0]
        elements = self._elements_read(called, parameter)
        return min(shape.bytes, elements * shape.bits / 8)

    def _elements_read(self, called: Computation, source: Instruction) -> float:
        total = 0.0
        for user in called.users[source.name]:
            is_first = called.instructions[user.operands[0]] is source
            if user.opcode in _SEEN_THROUGH:
                # A fusion whose result is its operand in another form reads all of it.
                inner = self._elements_read(called, user)
                total += source.shapes[0].elements if user is called.root else inner
            elif user.opcode in _SLICES and is_first:
                total += user.shapes[0].elements
            elif user.opcode == "fusion":
                inside = self._module.computations[user.called("calls") or ""]
                for index, name in enumerate(user.operands):
                    if name == source.name:
                        total += self._elements_read(inside, inside.parameters[index])
            elif not (_is_passing(called, user) or (user.opcode == "dynamic-update-slice" and is_first)):
                return float(source.shapes[0].elements)
        return total

    def _written(self, called: Computation, result: Instruction) -> list[float]:
        """Counts the bytes that a fusion writes of each result."""
        if result.opcode == "tuple":
            return [w for operand in called.operands(result) for w in self._written(called, operand)]
        origin = result
        while origin.opcode in _SEEN_THROUGH:
            origin = called.operands(origin)[0]
        whole = [shape.bytes for shape in result.shapes]
        if origin.opcode == "dynamic-update-slice":
            return [called.operands(origin)[1].shapes[0].elements * result.shapes[0].bits / 8]
        if origin.opcode == "fusion" and len(whole) == 1:
            inside = self._module.computations[origin.called("calls") or ""]
            return [min(whole[0], *self._written(inside, inside.root))]
        if origin.opcode == "scatter" and len(whole) == 1:
            return [min(whole[0], called.operands(origin)[-1].shapes[0].bytes)]
        if origin is result and (origin.opcode == "parameter" or _is_passing(called, origin)):
            return [0.0] * len(whole)
        return whole


def _is_passing(called: Computation, user: Instruction) -> bool:
    """Tells whether ``user`` moves nothing: a tuple, or a collective in steps that has begun before."""
    if user.opcode in ("tuple", "get-tuple-element"):
        return True
    return is_later_part(called, user) or user.text("custom_call_target") == "AsyncCollectiveDone"


def is_later_part(computation: Computation, instruction: Instruction) -> bool:
    """Tells whether this is a TPU's collective in steps, which counts where it starts.

    Each fusion that it runs beside names it again, under the same ``chain_id``.
    """
    if instruction.opcode not in COLLECTIVES or "chain_id=" not in instruction.attributes:
        return False
    targets = (i.text("custom_call_target") for i in computation.instructions.values())
    return "AsyncCollectiveStart" not in targets
