"""Rewards of a judge: a score by a rubric, and how often the response beats others."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Literal

from hybrid_jax.core.ranges import Finite, settings
from hybrid_jax.rewards.base import REWARDS
from hybrid_jax.rewards.judge import Endpoint, Judge, Question
from hybrid_jax.rewards.judge_cache import key_of
from hybrid_jax.rewards.judge_parsing import pairwise_messages, read_score, read_winner, rubric_messages
from hybrid_jax.rewards.model_based import needed_column, texts_of_rows

RUBRIC = "How helpful, correct and well written is the response to the prompt?"
CRITERION = "the one that is more helpful, more correct and better written."


def _new_log() -> Any:
    return field(default_factory=dict, init=False, repr=False, compare=False)


@REWARDS.register("rubric_judge", risk="sends a key to the address in its settings")
@settings
class RubricJudge:
    """The score that a language model gives the response by a rubric, scaled to [0, 1].

    Zheng et al. 2023 (arXiv:2306.05685), single-answer grading. The response is data to the judge, never an
    instruction; what is not exactly ``{"score": x}`` is no answer.

    Attributes:
        endpoint: The language model.
        rubric: What to judge.
        scale: Lowest and highest score that the judge may give.
        columns: Names of columns that it sees beside the prompt, such as ``references``.
        shows_prompt: Whether it sees the prompt.
    """

    endpoint: Endpoint
    rubric: str = RUBRIC
    scale: tuple[Finite, Finite] = (1.0, 10.0)
    columns: tuple[str, ...] = ()
    shows_prompt: bool = True
    _state: dict[str, Any] = _new_log()

    def __post_init__(self) -> None:
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must be (lowest, highest), got {self.scale}")

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts asking for a mark of each response; returns what waits for the answers."""
        seen = {name: texts_of_rows(needed_column(columns, name), name) for name in self.columns}
        questions = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            texts = {"prompt": prompt} if self.shows_prompt else {}
            texts |= {name: "\n\n".join(column[row]) for name, column in seen.items()}
            questions.append(self._question({**texts, "response": response}))
        return _judge(self).start(questions)

    def diagnostics(self) -> dict[str, float]:
        """Questions asked, cached, retried and failed, tokens and dollars since the last call."""
        return _judge(self).take_counts()

    def _question(self, texts: dict[str, str]) -> Question:
        lowest, highest = self.scale
        key = key_of("rubric", *_settings(self.endpoint), self.rubric, self.scale, list(texts.items()))
        messages = rubric_messages(self.rubric, lowest, highest, texts, secrets.token_hex(8))
        return Question(key, messages, lambda answer: read_score(answer, lowest, highest))


@REWARDS.register("pairwise_judge", risk="sends a key to the address in its settings")
@settings
class PairwiseJudge:
    """How often the judge prefers the response to others: the mean over them of P(response wins), in [0, 1].

    Each pair is judged in both orders and averaged (Zheng et al. 2023, arXiv:2306.05685, section 3.4), so that
    a judge that likes the first one gives ½; `diagnostics` says how often the two verdicts agree.

    Attributes:
        endpoint: The language model.
        against: The column of the others: texts, a list a row.
        criterion: Which one is better.
    """

    endpoint: Endpoint
    against: Literal["references", "opponents"] = "references"
    criterion: str = CRITERION
    _state: dict[str, Any] = _new_log()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts asking for each pair in both orders; returns what waits for the answers."""
        others = texts_of_rows(needed_column(columns, self.against), self.against)
        questions = []
        for prompt, response, texts in zip(prompts, responses, others, strict=True):
            for other in texts:
                questions += [self._question(prompt, response, other), self._question(prompt, other, response)]
        finish = _judge(self).start(questions)

        def scores() -> list[float]:
            values = iter(finish())
            return [self._win_rate([(next(values), next(values)) for _ in texts]) for texts in others]

        return scores

    def diagnostics(self) -> dict[str, float]:
        """``swap_consistency``: share of the pairs whose two verdicts agree; and as `RubricJudge`'s."""
        counts = _judge(self).take_counts()
        pairs, agreed = counts.pop("pairs", 0), counts.pop("agreed", 0)
        return {**counts, **({"swap_consistency": agreed / pairs} if pairs else {})}

    def _win_rate(self, verdicts: Sequence[tuple[float, float]]) -> float:
        """Win rate of one response; in the first verdict of each pair it stands first, in the second verdict
        second."""
        agreed = sum(first == 1.0 - second for first, second in verdicts)
        _judge(self).count(pairs=len(verdicts), agreed=agreed)
        return sum(0.5 * (first + 1.0 - second) for first, second in verdicts) / len(verdicts)

    def _question(self, prompt: str, first: str, second: str) -> Question:
        texts = {"prompt": prompt, "first response": first, "second response": second}
        key = key_of("pairwise", *_settings(self.endpoint), self.criterion, list(texts.items()))
        return Question(key, pairwise_messages(self.criterion, texts, secrets.token_hex(8)), read_winner)


def _judge(reward: RubricJudge | PairwiseJudge) -> Judge:
    if "judge" not in reward._state:
        reward._state["judge"] = Judge(reward.endpoint)
    return reward._state["judge"]


def _settings(endpoint: Endpoint) -> tuple[Any, ...]:
    """The settings that an answer depends on, beside the question."""
    return endpoint.url, endpoint.model, endpoint.temperature, endpoint.max_answer_tokens
