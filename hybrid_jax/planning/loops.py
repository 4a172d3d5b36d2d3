"""Counts how often a loop of a compiled program turns, by simulating its counter; all other values are unknown.

A value is an int (or bool), a tuple of values, or None where it depends on data. Logic has three values: "and"
of something false and something unknown is false. So a loop that may stop early still has an upper bound.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_jax.planning.hlo import Computation, Instruction, Module

Value = Any  # int | bool | tuple[Value, ...] | None
MOST_TURNS = 2**17  # a loop that still turns then is taken to have no bound

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier")


@dataclass(frozen=True)
class Turns:
    """The number of times that a loop's body runs: at most, if it ``may_stop``; None where it is unknown."""

    count: int | None
    may_stop: bool
    final: Value  # what is known of the loop's state after the last turn
    invariant: Value  # what is known of the state on every turn


def turns_of(module: Module, loop: Instruction, state: Value) -> Turns:
    """Counts the turns of a ``while`` instruction that starts with ``state``."""
    condition = module.computations[loop.called("condition") or ""]
    body = module.computations[loop.called("body") or ""]
    moving = _moving_integers(body)
    size = len(body.root.operands) if body.root.opcode == "tuple" else 1
    state = list(state) if isinstance(state, tuple) else [None] * size
    invariant = tuple(v if _is_passed_on(body, i) else None for i, v in enumerate(state))
    state = [value if i in moving else invariant[i] for i, value in enumerate(state)]
    count, may_stop = 0, False
    while (goes_on := evaluate(module, condition, (tuple(state),))) is not False and count < MOST_TURNS:
        may_stop |= goes_on is None
        evaluator = _Evaluator(module, body, (tuple(state),))
        following = [evaluator(body.root.operands[i]) if i in moving else v for i, v in enumerate(state)]
        if following == state:
            count = MOST_TURNS  # no element with a known value changes
            break
        state, count = following, count + 1
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return Turns(int(known.group(1)), False, tuple(state), invariant)
    if count >= MOST_TURNS:
        return Turns(None, True, invariant, invariant)
    return Turns(count, may_stop, tuple(state), invariant)


def evaluate(module: Module, computation: Computation, parameters: Sequence[Value]) -> Value:
    """Evaluates the result of ``computation`` as far as it is known."""
    return _Evaluator(module, computation, parameters)(computation.root_name)


def known_value(module: Module, computation: Computation, parameters: Sequence[Value], name: str) -> Value:
    """Evaluates one instruction as far as its value is known."""
    return _Evaluator(module, computation, parameters)(name)


def _moving_integers(body: Computation) -> set[int]:
    """Finds the integers in a loop's state that its body changes."""
    if body.root.opcode != "tuple":
        return set()
    operands = body.operands(body.root)
    scalars = {i for i, operand in enumerate(operands) if operand.shapes[0].is_integer_scalar}
    return {i for i in scalars if not _is_passed_on(body, i)}


def _is_passed_on(body: Computation, index: int) -> bool:
    """Checks whether the body returns element ``index`` of its state unchanged."""
    if body.root.opcode != "tuple":
        return False
    element = body.operands(body.root)[index]
    while element.opcode in ("copy", "bitcast"):
        element = body.operands(element)[0]
    is_element = element.opcode == "get-tuple-element" and body.operands(element)[0].opcode == "parameter"
    return is_element and _index(element) == index


def _index(element: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", element.attributes)
    assert found is not None, element
    return int(found.group(1))


class _Evaluator:
    """Evaluates the instructions of one computation with given parameters, each at most once."""

    def __init__(self, module: Module, computation: Computation, parameters: Sequence[Value]):
        self._module, self._computation, self._parameters = module, computation, parameters
        self._known: dict[str, Value] = {}

    def __call__(self, name: str) -> Value:
        if name not in self._known:
            self._known[name] = self._value(self._computation.instructions[name])
        return self._known[name]

    def _value(self, instruction: Instruction) -> Value:
        opcode = instruction.opcode
        if opcode == "parameter":
            return self._parameters[int(instruction.literal)]
        if opcode == "constant":
            return _constant(instruction)
        if opcode == "tuple":
            return tuple(map(self, instruction.operands))
        if opcode == "get-tuple-element":
            whole = self(instruction.operands[0])
            return whole[_index(instruction)] if isinstance(whole, tuple) else None
        if opcode == "while":
            return turns_of(self._module, instruction, self(instruction.operands[0])).final
        if opcode in ("fusion", "call"):
            called = instruction.called("calls" if opcode == "fusion" else "to_apply")
            arguments = tuple(map(self, instruction.operands))
            return evaluate(self._module, self._module.computations[called or ""], arguments)
        if opcode in _SAME:
            return self(instruction.operands[0])
        if instruction.shapes and instruction.shapes[0].is_integer_scalar:
            return _scalar(instruction, [self(name) for name in instruction.operands])
        return None


def _constant(instruction: Instruction) -> Value:
    if not instruction.shapes[0].is_integer_scalar:
        return None
    words = {"true": True, "false": False}
    return words[instruction.literal] if instruction.literal in words else int(instruction.literal)


def _scalar(instruction: Instruction, operands: list[Value]) -> Value:
    opcode = instruction.opcode
    if opcode == "and" and instruction.shapes[0].dtype == "pred":
        return False if False in operands else None if None in operands else True
    if opcode == "or" and instruction.shapes[0].dtype == "pred":
        return True if True in operands else None if None in operands else False
    if opcode == "select" and operands[0] is not None:
        return operands[1 if operands[0] else 2]
    if None in operands:
        return None
    if opcode in _ARITHMETIC:
        return _ARITHMETIC[opcode](*operands)
    if opcode == "compare":
        direction = re.search(r"\bdirection=(\w+)", instruction.attributes)
        return _COMPARISONS[direction.group(1)](*operands) if direction else None
    if opcode == "not" and instruction.shapes[0].dtype == "pred":
        return not operands[0]
    return None
