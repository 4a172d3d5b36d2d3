"""Environments that are written for TRL's ``environment_factory``: a class whose public methods are tools."""

from __future__ import annotations

from typing import Annotated, Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.environments.base import ENVIRONMENTS, AnswerFn, Step
from hybrid_jax.environments.calls import call_tools, schema_of, tools_of_object
from hybrid_jax.environments.factories import FACTORIES


@ENVIRONMENTS.register("trl")
@settings
class TRL:
    """An environment of TRL 1.16: ``reset(**row) -> str | None``, tools, perhaps ``get_reward() -> float``.

    The policy calls tools in its answers and reads their results; an answer without a call ends the
    conversation and earns ``get_reward()``, or 0 without it. TRL also pays a conversation that runs out of
    turns: here it is broken off, and the value of its last state counts.

    Attributes:
        factory: ``my_module:MyEnv``, called without arguments.
        prompt_column: of a row: a text, or messages; what ``reset`` returns is put behind the last of them.
    """

    factory: Annotated[Any, FACTORIES]
    prompt_column: str = "prompt"
    reads_rows = True

    def make(self, answer_fn: AnswerFn | None = None) -> TRLEnvironment:
        """An environment of its own for one conversation."""
        return TRLEnvironment(self)


class TRLEnvironment:
    """An environment of TRL over messages."""

    def __init__(self, settings: TRL):
        self._settings, self._environment = settings, settings.factory()
        self._functions = tools_of_object(self._environment, without=("reset", "get_reward"))
        self.tools = [schema_of(function) for function in self._functions.values()]

    def reset(self, seed: int, **row: Any) -> list[dict[str, Any]]:
        """Begins with a row. An environment of TRL takes no seed, unless a column of the row is one."""
        if self._settings.prompt_column not in row:
            raise UserError(f"a row has no column {self._settings.prompt_column!r}; it has {', '.join(row)}")
        prompt, more = row[self._settings.prompt_column], self._environment.reset(**row)
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if more is not None:
            asked[-1]["content"] += more
        return asked

    def step(self, text: str) -> Step:
        """Makes the calls in an answer; one without any is the last."""
        results, errors = call_tools(text, self._functions, self.tools)
        if results:
            return Step(results, 0.0, False, info={"tool_calls": len(results), "tool_errors": errors})
        reward = getattr(self._environment, "get_reward", float)()
        return Step([], float(reward), True, info={"tool_calls": 0, "tool_errors": 0})
