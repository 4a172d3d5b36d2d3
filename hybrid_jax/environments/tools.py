"""Questions of rows of data that the policy answers with the help of functions: those that ship, and yours."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Interval, MinLen

from hybrid_jax.core.batches import Message
from hybrid_jax.core.files import MEBIBYTE, read_text
from hybrid_jax.core.ranges import Finite, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.environments.calls import call_tools, schema_of
from hybrid_jax.metrics.answers import final_number
from hybrid_jax.metrics.retrieval import BM25

# A function with typed arguments and a docstring in Google style, or settings that are called like one.
TOOLS: Registry[Callable[..., Any]] = Registry("tool", needs=("__call__",))

_MOST_LETTERS, _MOST_BITS, _MOST_POWER = 200, 2000, 64
_OPERATORS: Mapping[type, Callable[[Fraction, Fraction], Fraction]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
}


@ENVIRONMENTS.register("tools")
@settings(kw_only=True)
class Tools:
    """A question of a row of data, which the policy answers with the help of functions.

    An answer that calls functions (`hybrid_jax.environments.calls`) is given their results; one without a call
    ends the conversation. It earns ``right`` where its final number is that of the row; where the row has none,
    if it is the row's text letter by letter.

    Attributes:
        tools: by the name that the policy calls: those that ship, or functions of yours, ``my_module:fn``, with
            typed arguments and a docstring in Google style, which the chat template shows to the policy.
        question: the column that is asked.
        answer: the column with the right answer.
        right: the reward of a right answer.
        error_reward: of each call that goes wrong.
    """

    reads_rows: ClassVar[bool] = True

    tools: Annotated[dict[str, Annotated[Any, TOOLS]], MinLen(1)]
    question: str = "prompt"
    answer: str = "response"
    right: Finite = 1.0
    error_reward: Finite = 0.0

    def make(self, answer_fn: AnswerFn | None = None) -> Workbench:
        """A conversation of its own."""
        return Workbench(self)


class Workbench:
    """One conversation with tools."""

    def __init__(self, settings: Tools):
        self._settings = settings
        self.tools = [_named_schema(name, tool) for name, tool in settings.tools.items()]

    def reset(self, seed: int, **row: Any) -> Sequence[Message]:
        """Asks the question of a row."""
        for column in (self._settings.question, self._settings.answer):
            if row.get(column) is None:
                raise ValueError(f"the row has no column {column!r}; it has {', '.join(row)}")
        self._answer = str(row[self._settings.answer])
        return [{"role": "user", "content": str(row[self._settings.question])}]

    def step(self, text: str) -> Step:
        """Gives the results of the calls in an answer, or ends where it holds none."""
        results, errors = call_tools(text, self._settings.tools, self.tools)
        if results:
            info = {"tool_calls": len(results), "tool_errors": errors}
            return Step(results, self._settings.error_reward * errors, False, info=info)
        right = _agrees(text, self._answer)
        return Step([], self._settings.right * right, True, info={"right": float(right)})


def _named_schema(name: str, tool: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a tool, under the name that the policy calls."""
    schema = schema_of(tool if inspect.isfunction(tool) else tool.__call__)
    return {**schema, "function": {**schema["function"], "name": name}}


def _agrees(text: str, answer: str) -> bool:
    wanted, found = final_number(answer), final_number(text)
    if wanted is None:
        return text.strip() == answer.strip()
    return found is not None and found.agrees(wanted)


@TOOLS.register("calculator")
@settings
class Calculator:
    """Exact arithmetic with + - * / ** and parentheses, bounded in length and in digits."""

    def __call__(self, expression: str) -> str:
        """Calculates an expression.

        Args:
            expression: such as 2 * (3 + 4)
        """
        if len(expression) > _MOST_LETTERS:
            raise ValueError(f"at most {_MOST_LETTERS} letters")
        try:
            value = _value(ast.parse(expression.strip(), mode="eval").body, expression.strip())
        except (SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"no arithmetic: {expression!r}") from None
        return str(value) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr, text: str) -> Fraction:
    """The value of a syntax tree of numbers and operators; everything else is refused, nothing is executed."""
    match node:
        # As it is written: 0.1 is a tenth, and 1e999999999 would take all memory.
        case ast.Constant() if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number := _written(node, text)):
            value = Fraction(number)
        case ast.UnaryOp(op=ast.USub()):
            value = -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            value = _value(node.operand, text)
        case ast.BinOp(op=ast.Pow()):
            base, power = _value(node.left, text), _value(node.right, text)
            if power.denominator != 1 or abs(power) > _MOST_POWER or (not base and power < 0):
                raise ValueError(f"a power must be a whole number of at most {_MOST_POWER}")
            value = Fraction(base ** int(power))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _value(node.left, text), _value(node.right, text)
            if isinstance(node.op, ast.Div) and not right:
                raise ValueError("division by 0")
            value = _OPERATORS[type(node.op)](left, right)
        case _:
            raise ValueError(f"no arithmetic: {_written(node, text)!r}")
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ValueError("the number is too large")
    return value


def _written(node: ast.expr, text: str) -> str:
    return ast.get_source_segment(text, node) or ""


@TOOLS.register("search")
@settings
class Search:
    """The paragraphs of a text file that fit some words best, by BM25.

    Attributes:
        path: of a plain text of at most 64 MiB; empty lines part its paragraphs.
        count: paragraphs that are given, at most.
        most_letters: of each of them.
    """

    path: Path
    count: Annotated[int, Interval(ge=1, le=20)] = 3
    most_letters: Annotated[int, Interval(ge=1, le=10_000)] = 500

    def __call__(self, query: str) -> str:
        """Finds paragraphs of a text.

        Args:
            query: words to look for
        """
        stamp = Path(self.path).stat().st_mtime_ns if Path(self.path).exists() else 0
        found = _index(str(self.path), stamp).search(query, self.count)
        return "\n\n".join(text[: self.most_letters] for text in found) or "nothing found"


@functools.lru_cache(4)
def _index(path: str, stamp: int) -> BM25:
    """The index of a file, made once for each time that it was written."""
    parts = read_text(path, 64 * MEBIBYTE, "path of the tool search").split("\n\n")
    return BM25([" ".join(part.split()) for part in parts if part.strip()])
