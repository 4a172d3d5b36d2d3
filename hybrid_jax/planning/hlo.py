"""Reads the text of a compiled program: optimised HLO, as XLA's CPU, GPU and TPU compilers print it.

Only what costs are counted from is kept: opcodes, shapes, operands and the text of the attributes. The format
is that of ``compiled.as_text()``; https://openxla.org/xla/operation_semantics says what the opcodes mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Shape:
    """One array: its element type, its sizes and the memory that it lies in (0 is the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """The bits of one element; 0 for a token, which orders operations and holds no data."""
        if self.dtype == "pred":
            return 8
        digits = re.search(r"\d+", self.dtype)
        return int(digits.group()) if digits else 0

    @property
    def bytes(self) -> float:
        """The bytes of the whole array; elements of 4 bits take half a byte each."""
        return self.elements * self.bits / 8

    @property
    def is_integer_scalar(self) -> bool:
        """Tells whether it is one integer or truth value, as a loop's counter is."""
        return not self.dims and (self.dtype == "pred" or self.dtype[0] in "su")

    @property
    def is_real(self) -> bool:
        """Tells whether its elements are floating-point numbers."""
        return self.dtype.startswith(("f", "bf"))


@dataclass(frozen=True)
class Instruction:
    """One line ``name = shapes opcode(operands), attributes``; a tuple has the shapes of all its arrays."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str

    def called(self, attribute: str) -> str | None:
        """The name of the computation that an attribute such as ``body=%name`` refers to; None without it."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def integers(self, attribute: str) -> tuple[int, ...]:
        """The integers of an attribute such as ``lhs_contracting_dims={1,2}``; an empty tuple without it."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, found.group(1).split(","))) if found and found.group(1) else ()

    def text(self, attribute: str) -> str | None:
        """The text of an attribute in quotes; None without it."""
        found = re.search(rf'\b{attribute}="([^"]*)"', self.attributes)
        return found.group(1) if found else None


@dataclass
class Computation:
    """Instructions in order; the result is the one marked ROOT."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root_name: str = ""

    @property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return self.instructions[self.root_name]

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The instructions that stand for the arguments, by their position."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read the result of each instruction, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results an instruction reads."""
        return [self.instructions[name] for name in instruction.operands]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The shapes of all arrays that an instruction reads."""
        return [shape for operand in self.operands(instruction) for shape in operand.shapes]


@dataclass
class Module:
    """A compiled program that ``num_devices`` devices run together."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int

    @classmethod
    def parse(cls, text: str) -> Module:
        """Reads ``compiled.as_text()``.

        Raises:
            ValueError: the text holds no computation marked ENTRY.
        """
        computations, entry, current = {}, "", None
        for line in _joined(text.splitlines()):
            if current is None:
                if header := _HEADER.match(line):
                    current = Computation(header.group(2))
                    entry = current.name if header.group(1) else entry
            elif _END.match(line):
                computations[current.name], current = current, None
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found.group(2), found.group(3))
                current.instructions[instruction.name] = instruction
                if found.group(1) or not current.root_name:
                    current.root_name = instruction.name
        if entry not in computations:
            raise ValueError("text must be an HLO module with an ENTRY computation")
        # The devices are partitions times replicas; a count that the header does not name is 1.
        head = text[: text.find("\n")]
        counts = (re.search(rf"{name}=(\d+)", head) for name in ("num_partitions", "replica_count"))
        return cls(computations, entry, math.prod(int(c.group(1)) for c in counts if c))


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Joins lines into whole instructions, whose attributes may go on over several lines."""
    whole = ""
    for line in lines:
        if _END.match(line) or _HEADER.match(line) or _INSTRUCTION.match(line):
            yield whole
            whole = line
        else:
            whole += line
    yield whole


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The shapes in the text of a type such as ``(f32[2,3], s32[])``, in order."""
    return tuple(_shapes(_COMMENT.sub("", text)))


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, sizes, layout in _ARRAY.findall(text):
        dims = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, dims, int(space.group(1)) if space else 0)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    literal = _COMMENT.sub("", rest[start + 1 : stop - 1])
    names = () if rest[:start] in ("constant", "parameter") else tuple(_NAME.findall(literal))
    return Instruction(name, rest[:start], shapes_of(kind), names, literal, rest[stop:])


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at ``start``."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        character = text[index]
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
            if not depth:
                return index + 1
    raise ValueError(f"text must close every parenthesis, got {text[start : start + 80]!r}")
