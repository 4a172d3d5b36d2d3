"""Rewards for answers that can be verified: numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.metrics.answers import Number, final_number
from hybrid_jax.rewards.base import REWARDS


@REWARDS.register("final_number")
@settings
class FinalNumber:
    """1 if the final number of the response is that of its row, else 0 (GSM8K; Cobbe et al. 2021).

    The final number is the one after the last ``####``, or the last number of a response without the mark.
    Numbers are compared exactly, as fractions: ``$1,000.00`` is 1000, ``1/2`` is 0.5, 0.33 is not 1/3, and
    ``50%`` is 50 or 0.5. Nothing is executed. A comma is never a decimal point.

    Attributes:
        column: The column with the right answer: a number, a text with one (a whole solution may stand
            there), or a list of accepted ones.
        marker: What precedes the answer; None always takes the last number.
    """

    column: str = "final_answer"
    marker: str | None = "####"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        wanted = column_of(columns, self.column)
        scores = []
        for row, (response, value) in enumerate(zip(responses, wanted, strict=True)):
            answers = self._answers(row, value)
            found = final_number(response, self.marker)
            scores.append(float(found is not None and any(found.agrees(answer) for answer in answers)))
        return scores

    def _answers(self, row: int, value: Any) -> list[Number]:
        values = value if isinstance(value, list | tuple) else [value]
        numbers = [final_number(str(item), self.marker) for item in values]
        known = [number for number in numbers if number is not None]
        if not known or len(known) < len(numbers):
            raise UserError(f"row {row}: column {self.column!r} must hold a number, got {str(value)[:60]!r}")
        return known


def column_of(columns: dict[str, Any], name: str) -> Sequence[Any]:
    """The column of that name; a `UserError` with the nearest name if there is none."""
    if name not in columns:
        raise UserError(f"the data has no column {name!r}; {suggest(name, columns)}")
    return columns[name]
