"""The reward of a run: named parts, brought to one scale one by one and then combined.

The order is fixed:

    raw → transform → normaliser → clip → weight → combine → penalty → baseline → placement

Normalising each part before it is combined keeps one of large scale from drowning the others. Where a part has
a normaliser, ``a r + b`` in place of ``r`` (a > 0) leaves every update as it was. So a penalty is in units of
the combined score. The baseline sees it, and where a part is compared among the answers to one prompt
(``normalise: group``), so is the penalty: what counts is how much more a response pays than they do on average.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from annotated_types import MinLen
from jaxtyping import Array, Bool, Float, Int

import hybrid_jax.rewards.catalogue  # noqa: F401  fills the registry
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import suggest
from hybrid_jax.rewards.base import StartedReward, check_columns, columns_of, start_reward
from hybrid_jax.rewards.combine import (
    COMBINERS,
    Baseline,
    Combiner,
    FittedCombiner,
    ObservingCombiner,
    Weighing,
    WeightedSum,
)
from hybrid_jax.rewards.part import Part
from hybrid_jax.rewards.part_metrics import LENGTH, SCORE, correlations, describe, mean_weights
from hybrid_jax.rewards.postprocess import Groups
from hybrid_jax.rewards.segments import TokenTexts, start_segments

RewardState = dict[
    str, Any
]  # of each part with a normaliser, and of what is behind them: see `CompositeReward`
Raw = Mapping[str, np.ndarray]  # float32 [B]; [B R], NaN where no segment ends, of a part on segments

COMBINER, BASELINE = "combiner/", "baseline/"  # in `RewardState`; no part may be called so


@dataclass(frozen=True)
class Scores:
    """A rollout with its reward.

    Attributes:
        totals: float32 [B], what training receives: penalty and baseline are taken.
        plain: float32 [B], what is logged as ``score``: see `CompositeReward.plain_scores`.
        placed: float32 [B R], what of it is received with earlier tokens: the parts on segments, if any. The
            rest is received with the last token.
        baseline: float32 [B], what it has taken from the totals, if there is one.
        metrics: to log, by name.
    """

    totals: np.ndarray
    plain: np.ndarray
    placed: np.ndarray | None
    baseline: np.ndarray | None
    metrics: Mapping[str, float]


@settings
class CompositeReward:
    """Named parts, all on texts or all on tokens, combined into one score.

    The statistics of a normaliser count every rollout once. The state is a plain pytree for the checkpoint:
    by part for those with a normaliser, under ``combiner/`` and ``baseline/`` for what follows.

    Attributes:
        parts: By name.
        combine: How the parts make one score; the weighted sum.
        baseline: What is taken from every score at the end; None takes nothing.
    """

    parts: Annotated[dict[str, Part], MinLen(1)]
    combine: Annotated[Combiner, COMBINERS] = field(default_factory=WeightedSum)
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        if taken := {COMBINER, BASELINE, SCORE, LENGTH} & self.parts.keys():
            raise ValueError(f"parts must not be called {min(taken)!r}")
        if len({part.on_device for part in self.parts.values()}) > 1:
            kinds = ", ".join(
                f"{name} on {'tokens' if p.on_device else 'texts'}" for name, p in self.parts.items()
            )
            raise ValueError(f"parts must all score texts or all score tokens, got {kinds}")
        self._check_combiner()

    def check_columns(self, columns: Iterable[str]) -> None:
        """Checks that the data has every column that a part needs, or raises `RewardError`."""
        known = list(columns)
        for name, part in self.parts.items():
            check_columns(name, part.reward, known)

    def _check_combiner(self) -> None:
        self.combine.check(list(self.parts))
        if self.on_device and (not isinstance(self.combine, WeightedSum) or self.baseline is not None):
            raise ValueError("combine must be weighted_sum, without a baseline, for rewards on tokens")
        placed = [name for name, part in self.parts.items() if part.is_placed]
        if placed and not self.combine.keeps_places:
            raise ValueError(
                f"combine must be a sum of parts, for {placed[0]} has a level, got {self.combine!r}"
            )
        for name in getattr(self.combine, "limits", ()):
            if self.parts[name].normalise is not None:
                raise ValueError(
                    f"parts.{name}.normalise must be false: its limit is in its own units, got true"
                )

    @property
    def on_device(self) -> bool:
        """Tells whether every part scores tokens: then `score_tokens` is the reward, else `score`."""
        return all(part.on_device for part in self.parts.values())

    @property
    def is_placed(self) -> bool:
        """Tells whether a part scores segments, for which `raw` needs the text that each token adds."""
        return any(part.is_placed for part in self.parts.values())

    def init(self) -> RewardState:
        """Statistics of no rollouts yet."""
        state: RewardState = {n: p.normalise.init() for n, p in self.parts.items() if p.normalise is not None}
        if remembered := self.combine.init(list(self.parts)):
            state[COMBINER] = remembered
        if self.baseline is not None:
            state[BASELINE] = self.baseline.init()
        return state

    def score(
        self,
        state: RewardState,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        groups: Groups | None = None,
    ) -> tuple[np.ndarray, RewardState, dict[str, np.ndarray]]:
        """Scores one rollout; call it once a rollout, for the statistics count every call. See `weigh`.

        Returns:
            Scores float32 [B] less the baseline, the new state, and the raw values float32 [B] of each part.

        Raises:
            RewardError: A part failed, see `evaluate_reward`.
        """
        raw = self.raw(prompts, responses, columns)
        scores, state = self.weigh(state, raw, prompts, groups)
        return scores.totals, state, raw

    def raw(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        pieces: TokenTexts | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The raw values of each part: of any rows, for a row does not depend on the others.

        Rewards that wait for a device or a network are started first, the others are computed meanwhile.

        Args:
            prompts: B texts.
            responses: B texts.
            columns: Further columns of the data, each of length B.
            pieces: What each token adds (`segments.token_texts`), for parts on segments; None makes them score
                whole responses.
            length: R, of the rows of tokens.

        Raises:
            RewardError: A part failed, see `evaluate_reward`.
        """

        def start(name: str, part: Part):
            if not part.is_placed or pieces is None:
                return start_reward(name, part.reward, prompts, responses, columns)
            longest = max(map(len, pieces), default=0) if length is None else length
            return start_segments(name, part.reward, part.level, prompts, pieces, columns or {}, longest)

        ordered = sorted(self.parts.items(), key=lambda item: not isinstance(item[1].reward, StartedReward))
        started = {name: start(name, part) for name, part in ordered}
        finished = {n: finish() for n, finish in reversed(started.items())}  # what others compute comes last
        return {name: finished[name] for name in self.parts}

    def weigh(
        self,
        state: RewardState,
        raw: Raw,
        prompts: Sequence[str],
        groups: Groups | None = None,
        lengths: np.ndarray | None = None,
        penalties: np.ndarray | None = None,
    ) -> tuple[Scores, RewardState]:
        """The scores of a whole rollout, and the new state.

        Args:
            state: of the rollouts before.
            raw: Of each part, what `raw` gives.
            prompts: B texts.
            groups: int [B], rows with one number answer one prompt, whatever the texts; None: no two rows do.
            lengths: Of the responses, [B], for their correlation with the parts.
            penalties: What each response pays, in units of the combined score, [B]; None: nothing.
        """
        groups = np.arange(len(prompts)) if groups is None else groups
        state = {**state, **self._updated(state, raw)}
        values, segments, metrics = {}, {}, {}
        for name, part in self.parts.items():
            unclipped = part.unclipped(state.get(name), raw[name], groups)
            value = part.clipped(unclipped)
            metrics |= describe(name, part, np.asarray(raw[name]), unclipped, value)
            segments |= {name: np.nan_to_num(value, nan=0.0)} if value.ndim == 2 else {}
            values[name] = _of_responses(value)
        weighing, remembered = self._combined(self._fitted(state), values, prompts)
        # Float32 before the penalty, as a reward on the device is.
        totals = weighing.score(values).astype(np.float32) - self._penalties(penalties, groups)
        placed = sum(weighing.coefficients[n][:, None] * segment for n, segment in segments.items())
        baseline = None
        if COMBINER in state:
            state[COMBINER] = remembered
        if self.baseline is not None:
            totals64 = totals.astype(np.float64)
            baseline, state[BASELINE] = self.baseline.update(state[BASELINE], totals64, groups)
            baseline = baseline.astype(np.float32)
            totals = totals - baseline
        metrics |= {**weighing.metrics, **mean_weights(self.combine, weighing)}
        plain = self.plain_scores(raw, prompts)
        metrics |= correlations({**values, SCORE: plain}, lengths)
        dense = np.asarray(placed, np.float32) if segments else None
        return Scores(totals, plain, dense, baseline, metrics), state

    def _penalties(self, penalties: np.ndarray | None, groups: Groups) -> Any:
        """The penalty taken from each score; in groups, if a part is, less the mean of its group."""
        if penalties is None or not any(part.is_in_groups for part in self.parts.values()):
            return np.float32(0.0) if penalties is None else penalties.astype(np.float32)
        means = np.bincount(groups, penalties) / np.maximum(np.bincount(groups), 1)
        return (penalties - means[groups]).astype(np.float32)

    def plain_scores(self, raw: Raw, prompts: Sequence[str]) -> np.ndarray:
        """The metric ``score``, float32 [B]: the parts as they are, on one scale for all time and every split.

            raw → transform → clip → weight → combine

        There is no normaliser, no clip in the units of one and no baseline, and the combiner is as it was when
        the run began, or was fitted: the same raw values get the same in every step.
        """
        plain, remembered = self._plain
        values = {
            name: _of_responses(part.clipped(np.asarray(part.transformed(np.asarray(raw[name], np.float64)))))
            for name, part in plain.parts.items()
        }
        return plain._combined(remembered, values, prompts)[0].score(values).astype(np.float32)

    @functools.cached_property
    def _plain(self) -> tuple[CompositeReward, Any]:
        """The same reward without normalisers and baseline, and what its combiner remembers."""
        parts = {
            n: p if p.normalise is None else replace(p, normalise=None, clip=None)
            for n, p in self.parts.items()
        }
        combine = getattr(self.combine, "without_arm", self.combine)  # of a bandit: no arm
        plain = replace(self, parts=parts, combine=combine, baseline=None)
        return plain, plain._fit({}) if isinstance(self.combine, FittedCombiner) else plain.init().get(
            COMBINER, {}
        )

    def _combined(
        self, remembered: Any, values: Mapping[str, np.ndarray], prompts: Sequence[str]
    ) -> tuple[Weighing, Any]:
        weights = {name: part.weight for name, part in self.parts.items()}
        return self.combine.combine(remembered, values, weights, prompts)

    def observe(self, state: RewardState, evaluation: Mapping[str, float]) -> RewardState:
        """The state once these numbers were measured, ``evaluation/<metric>``."""
        if not isinstance(self.combine, ObservingCombiner) or not evaluation:
            return state
        name = f"evaluation/{self.combine.metric}"
        if name not in evaluation:
            raise UserError(
                f"combine.metric must be a number of the evaluation; {suggest(name, dict(evaluation))}"
            )
        return {**state, COMBINER: self.combine.measured(state[COMBINER], evaluation[name])}

    def _fitted(self, state: RewardState) -> Any:
        """The state of the combiner, fitted first where it learns from preferences."""
        remembered, combiner = state.get(COMBINER, {}), self.combine
        if not isinstance(combiner, FittedCombiner) or combiner.is_fitted(remembered):
            return remembered
        is_normalised = any(part.normalise is not None for part in self.parts.values())
        return self._fit(state) if is_normalised else self._plain[1]

    def _fit(self, state: RewardState) -> Any:
        """The state of a combiner fitted on its preferences, with parts normalised by these statistics."""
        combiner: Any = self.combine
        pairs = combiner.preferences.load("train")
        prompts = [pair.prompt for pair in pairs]
        columns = columns_of([pair.example for pair in pairs])
        sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        raw = [self.raw(prompts, side, columns) for side in sides]
        # One group: a pair is too few for a mean and a scale of its own, and a response alone would be 0.
        one_group = np.zeros(2 * len(pairs), int)
        values = {
            name: part.clipped(
                part.unclipped(state.get(name), np.concatenate([side[name] for side in raw]), one_group)
            )
            for name, part in self.parts.items()
        }
        chosen, rejected = (
            {name: both[half] for name, both in values.items()}
            for half in (slice(len(pairs)), slice(len(pairs), None))
        )
        weights = {name: part.weight for name, part in self.parts.items()}
        return combiner.fit(chosen, rejected, weights, prompts)

    def _updated(self, state: RewardState, raw: Raw) -> RewardState:
        return {
            name: part.normalise.update(state[name], part.transformed(np.asarray(raw[name], np.float64)))
            for name, part in self.parts.items()
            if part.normalise is not None
        }

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        """The sum of device rewards: pure JAX, float32 [B]."""
        scores = jnp.zeros(tokens.shape[0], jnp.float32)
        for part in self.parts.values():
            raw = part.reward.score_tokens(tokens, attention_mask, response_mask)
            scores += part.weight * part.clipped(part.transformed(raw))
        return scores


def _of_responses(values: np.ndarray) -> np.ndarray:
    """[B] of [B], or of segments [B R], NaN where none ends: their sum."""
    return np.nan_to_num(values, nan=0.0).sum(axis=1) if values.ndim == 2 else values
