"""The reward of self-play: how often a response beats those of a frozen opponent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float

from hybrid_jax.core.ranges import Positive, settings
from hybrid_jax.rewards.base import REWARDS, DeviceReward, check_reward, start_reward
from hybrid_jax.rewards.model_based import needed_column, texts_of_rows


@REWARDS.register("win_rate")
@settings
class WinRate:
    """``1/K Σ_k P(y beats y_k) - ½`` against K responses of a frozen opponent to the same prompt, in [-½, ½].

        kind scores:      P = sigmoid((r(y) - r(y_k)) / scale) for a reward r of one response
        kind preference:  P = r(y, y_k), where r is a reward in [0, 1] with the column ``references`` = y_k

    Zero-sum: the values of a self-pair, y against y' and y' against y, add up to 0, if the preference is
    symmetric, as scores are (Wu et al. 2024, arXiv:2405.00675). The column ``opponents`` holds the K responses
    of each row; the opponents' other columns are those of the row.

    Attributes:
        reward: r, on texts.
        scale: Difference of scores that wins with probability σ(1) = 0.73; above 0.
        kind: What r is.
    """

    reward: Annotated[Any, REWARDS]
    scale: Positive = 1.0
    kind: Literal["scores", "preference"] = "scores"

    def __post_init__(self) -> None:
        if isinstance(self.reward, DeviceReward):
            raise ValueError(f"reward must be one on texts, got {self.reward!r}")
        check_reward(self.reward)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
        return self.start(prompts, responses, **columns)()

    def start(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Callable[[], list[float]]:
        """Starts scoring both sides; returns what waits for the mean win rates."""
        others = texts_of_rows(needed_column(columns, "opponents"), "opponents")
        counts = [len(texts) for texts in others]
        shared = {name: column for name, column in columns.items() if name != "opponents"}
        beats = self._preferred if self.kind == "preference" else self._higher
        finish = beats(prompts, responses, others, counts, shared)
        ends = np.cumsum(counts)

        def scores() -> list[float]:
            wins = finish()
            return [float(np.mean(wins[end - n : end])) - 0.5 for end, n in zip(ends, counts, strict=True)]

        return scores

    def _higher(self, prompts, responses, others, counts, columns) -> Callable[[], Float[np.ndarray, "N"]]:
        """Scores every text once, the opponents with the columns of their row."""
        asked = [*prompts, *_repeated(prompts, counts)]
        texts = [*responses, *itertools.chain.from_iterable(others)]
        both = {name: [*column, *_repeated(column, counts)] for name, column in columns.items()}
        finish = start_reward("win_rate.reward", self.reward, asked, texts, both)

        def wins() -> Float[np.ndarray, "N"]:
            scores = finish().astype(np.float64)
            own, theirs = np.repeat(scores[: len(counts)], counts), scores[len(counts) :]
            return _sigmoid((own - theirs) / self.scale)

        return wins

    def _preferred(self, prompts, responses, others, counts, columns) -> Callable[[], Float[np.ndarray, "N"]]:
        repeated = {name: _repeated(column, counts) for name, column in columns.items()}
        repeated["references"] = [[text] for texts in others for text in texts]
        asked, own = _repeated(prompts, counts), _repeated(responses, counts)
        finish = start_reward("win_rate.reward", self.reward, asked, own, repeated)

        def wins() -> Float[np.ndarray, "N"]:
            values = finish().astype(np.float64)
            if ((values < 0) | (values > 1)).any():
                raise ValueError(
                    "a preference must be in [0, 1]; set kind to scores for a reward of one response"
                )
            return values

        return wins


def _repeated(column: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    return [value for value, n in zip(column, counts, strict=True) for _ in range(n)]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
