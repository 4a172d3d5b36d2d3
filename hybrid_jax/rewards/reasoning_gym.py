"""The scorers of reasoning-gym as a reward, for prompts of the source of that name."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.data.reasoning_gym import entry_of
from hybrid_jax.rewards.base import REWARDS

MOST_LETTERS = 10_000
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
_ANYTHING = re.compile(r".*", re.DOTALL)  # the scorer evaluates nothing of the answer
_ARITHMETIC = re.compile(r"(?!.*\*\s*\*)[0-9+\-*/() ]{,200}")  # no powers, which take any time and memory
_LISTS = re.compile(r"""[\[\],\s0-9A-Z_'"-]*""")
# Tasks whose module evaluates texts as Python: the answers that its scorer may see. All others are refused.
_SAFE = {
    **dict.fromkeys(("basic_arithmetic", "bitwise_arithmetic", "number_sorting"), _ANYTHING),
    "propositional_logic": _ANYTHING,
    **dict.fromkeys(("countdown", "puzzle24"), _ARITHMETIC),
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _LISTS),
}


@REWARDS.register("reasoning_gym")
@settings
class ReasoningGymScore:
    """The score that reasoning-gym gives to an answer, in [0, 1]; the same each time.

    How strict it is depends on the task. Most accept one answer, letter by letter, and give
    (length of the answer) / (length of the response) where it stands within more text; number tasks forgive
    signs, zeros and commas; some give 0.01 to 0.5 for trying. ``right_only`` makes all of them 0 or 1.

    Some scorers evaluate an answer as Python. They see arithmetic, or lists, and nothing else: any other answer
    gets 0. Tasks that need more, such as integrals, are refused.

    Attributes:
        tag: the answer stands in the last ``<tag>…</tag>``, and a response without one gets 0; None takes the
            whole response without the space around it.
        right_only: 1 where the package gives 1, else 0.
    """

    tag: str | None = None
    right_only: bool = False

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], reasoning_gym: Sequence[Any]
    ) -> list[float]:
        rows = zip(responses, reasoning_gym, strict=True)
        scores = [self._score(response, *entry_of(key), str(key["task"])) for response, key in rows]
        return [float(score == 1.0) if self.right_only else score for score in scores]

    def _score(self, response: str, entry: Any, data: Any, task: str) -> float:
        answer: str | None = response.strip()
        if self.tag is not None:
            found = re.findall(f"<{re.escape(self.tag)}>(.*?)</{re.escape(self.tag)}>", response, re.DOTALL)
            answer = found[-1].strip() if found else None
        source = inspect.getsource(sys.modules[type(data).__module__])
        safe = _SAFE.get(task) if _EVALUATES.search(source) else _ANYTHING
        if safe is None:
            raise UserError(f"the scorer of {task!r} would run the answers as Python; take another task")
        if answer is None or len(answer) > MOST_LETTERS or not safe.fullmatch(answer):
            return 0.0
        try:
            return float(data.score_answer(answer=answer, entry=entry))
        except Exception:  # an answer that the scorer did not expect
            return 0.0
