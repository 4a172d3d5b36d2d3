"""From the values of several rewards to one score a response.

A combiner says how much each part counts in each row; ``score = offset + Σ coefficients · values``. Knowing the
coefficients lets a part that is placed on single tokens or sentences keep its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from annotated_types import MinLen

from hybrid_jax.core.ranges import Finite, NonNegative, Positive, Rate, settings
from hybrid_jax.core.registry import Registry
from hybrid_jax.rewards.postprocess import Groups

Values = Mapping[str, np.ndarray]  # part -> float64 [B]


@dataclass(frozen=True)
class Weighing:
    """How a rollout was weighed.

    Attributes:
        coefficients: of each part, float64 [B].
        offset: what is added, float64 [B] or a number.
        metrics: to log.
    """

    coefficients: Values
    offset: Any = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def score(self, values: Values) -> np.ndarray:
        """float64 [B]"""
        return self.offset + sum(self.coefficients[name] * value for name, value in values.items())


class Combiner(Protocol):
    """A frozen dataclass registered in `COMBINERS`; what it remembers is a pytree of numpy arrays."""

    keeps_places: ClassVar[
        bool
    ]  # whether its coefficients are all of it, so that a part may be placed on tokens

    def check(self, names: Sequence[str]) -> None:
        """Raises `ValueError` for parts that it cannot combine."""
        ...

    def init(self, names: Sequence[str]) -> Any:
        """The state before any rollout."""
        ...

    def combine(
        self, state: Any, values: Values, weights: Mapping[str, float], prompts: Sequence[str]
    ) -> tuple[Weighing, Any]:
        """How to weigh one rollout, and the new state.

        Args:
            state: of `init`, or of the rollout before.
            values: of each part, after its normaliser and clip.
            weights: of each part, as its settings say.
            prompts: B texts.
        """
        ...


@runtime_checkable
class FittedCombiner(Protocol):
    """A combiner that learns from preferences before the first rollout, and from nothing after."""

    @property
    def preferences(self) -> Any:
        """A source with ``load("train")``, of `hybrid_jax.data.preferences.Preference`."""
        ...

    def is_fitted(self, state: Any) -> bool:
        """Tells whether `fit` has made the state."""
        ...

    def fit(
        self, chosen: Values, rejected: Values, weights: Mapping[str, float], prompts: Sequence[str]
    ) -> Any:
        """The state that explains preferences best, from the values of both responses by part, [N] each."""
        ...


@runtime_checkable
class ObservingCombiner(Protocol):
    """A combiner that learns from a number of the evaluation."""

    metric: str  # its name, without ``evaluation/``

    def measured(self, state: Any, value: float) -> Any:
        """The state once ``metric`` is ``value``."""
        ...


COMBINERS: Registry[Any] = Registry("combiner")


class _Stateless:
    """Takes any parts and remembers nothing."""

    keeps_places: ClassVar[bool] = True

    def check(self, names: Sequence[str]) -> None: ...

    def init(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return {}


@COMBINERS.register("weighted_sum")
@settings
class WeightedSum(_Stateless):
    """``Σ w_i v_i``."""

    def combine(self, state, values, weights, prompts):
        """Weighs each part by its weight in every row."""
        return Weighing({name: np.full(value.shape, weights[name]) for name, value in values.items()}), state


@COMBINERS.register("product")
@settings
class Product(_Stateless):
    """``Π max(v_i, 0)^w_i``: one part at 0 makes the score 0. For parts in [0, ∞), weights above 0."""

    keeps_places: ClassVar[bool] = False

    def combine(self, state, values, weights, prompts):
        """Multiplies the powers; no part keeps a coefficient."""
        factors = [np.maximum(value, 0.0) ** weights[name] for name, value in values.items()]
        zeros = {name: np.zeros_like(value) for name, value in values.items()}
        return Weighing(zeros, offset=np.prod(factors, axis=0)), state


@COMBINERS.register("gate")
@settings
class Gate(_Stateless):
    """The weighted sum of the other parts where part ``by`` is above ``threshold``, ``otherwise`` elsewhere.

    For what nothing can make up for: a valid format, a safe text. ``otherwise`` must lie below what the others
    can give, or failing the gate pays.
    """

    by: str  # part that opens the gate
    threshold: Finite = 0.0  # value above which it is open
    otherwise: Finite = -1.0  # score where it is shut

    def check(self, names: Sequence[str]) -> None:
        """Refuses an unknown part, or a gate with nothing behind it."""
        _check_named("by", self.by, names)
        if len(names) < 2:
            raise ValueError("parts must hold what the gate lets through, got the gate alone")

    def combine(self, state, values, weights, prompts):
        """Weighs the other parts where the gate is open."""
        is_open = values[self.by] > self.threshold
        coefficients = {name: weights[name] * is_open for name in values}
        coefficients[self.by] = np.zeros(is_open.shape)
        fraction = {"gate_open_fraction": _mean(is_open)}
        return Weighing(coefficients, np.where(is_open, 0.0, self.otherwise), fraction), state


@COMBINERS.register("hierarchy")
@settings
class Hierarchy(_Stateless):
    """``w_h v_h + [v_h > threshold] · Σ w_i v_i``: aspects count once the whole is good enough.

    ALaRM (Lai et al. 2024, arXiv 2403.06754), "threshold-guided".

    Attributes:
        holistic: the part that judges the whole.
        threshold: in its units, after normaliser and clip.
    """

    holistic: str
    threshold: Finite = 0.0

    def check(self, names: Sequence[str]) -> None:
        """Refuses an unknown part."""
        _check_named("holistic", self.holistic, names)

    def combine(self, state, values, weights, prompts):
        """Weighs the aspects where the whole is good enough."""
        good = values[self.holistic] > self.threshold
        coefficients = {name: weights[name] * good for name in values}
        coefficients[self.holistic] = np.full(good.shape, weights[self.holistic])
        return Weighing(coefficients, metrics={"aspects_fraction": _mean(good)}), state


@settings
class Limit:
    """A bound on the mean of a part over a rollout: exactly one of the two."""

    at_most: Finite | None = None  # largest mean
    at_least: Finite | None = None  # smallest mean

    def __post_init__(self):
        given = [bound for bound in (self.at_most, self.at_least) if bound is not None]
        if len(given) != 1:
            raise ValueError(f"limit must set at_most or at_least, got {self.at_most} and {self.at_least}")

    def excess(self, value: Any) -> Any:
        """By how much a value is on the wrong side."""
        return value - self.at_most if self.at_most is not None else self.at_least - value


@COMBINERS.register("lagrangian")
@settings
class Lagrangian:
    """Rewards under constraints, such as toxicity at most x.

        score = (Σ_i w_i v_i − Σ_c λ_c excess_c) / (1 + Σ_c λ_c)
        λ_c ← clip(λ_c + learning_rate · mean excess_c, 0, max_multiplier)        after each rollout

    Gradient ascent on the multipliers (for language models Moskovitz et al. 2023, arXiv 2310.04373). Where a
    constraint holds its λ sinks to 0, and the score is the plain weighted sum. The division keeps the score on
    one scale.

    Attributes:
        limits: by the name of a part, in its units: after transform and clip. Such a part is not normalised,
            and its weight does not count.
        learning_rate: of the multipliers.
        max_multiplier: the largest λ.
        start: the first λ.
    """

    limits: Annotated[dict[str, Limit], MinLen(1)]
    learning_rate: Positive = 0.1
    max_multiplier: NonNegative = 100.0
    start: NonNegative = 0.0

    keeps_places: ClassVar[bool] = True

    def __post_init__(self):
        if self.start > self.max_multiplier:
            raise ValueError(f"start must be in [0, max_multiplier], got {self.start} of {self.max_multiplier}")

    def check(self, names: Sequence[str]) -> None:
        """Refuses limits on unknown parts, or on all of them."""
        for name in self.limits:
            _check_named("limits", name, names)
        if set(names) == set(self.limits):
            raise ValueError("parts must hold a reward besides those under limits, got none")

    def init(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The multipliers at the start."""
        return {name: np.asarray(self.start, np.float64) for name in self.limits}

    def combine(self, state, values, weights, prompts):
        """Weighs the parts by the multipliers, then moves those by what exceeds the limits."""
        scale = 1.0 + sum(state.values())
        coefficients = {name: np.full(value.shape, weights[name] / scale) for name, value in values.items()}
        offset = np.zeros(next(iter(values.values())).shape)
        new, metrics = {}, {}
        for name, limit in self.limits.items():
            multiplier, sign = state[name], 1.0 if limit.at_most is not None else -1.0
            coefficients[name] = np.full(values[name].shape, -sign * multiplier / scale)
            offset -= multiplier / scale * limit.excess(0.0)
            excess = _mean(limit.excess(values[name]))
            moved = multiplier + self.learning_rate * excess
            new[name] = np.asarray(np.clip(moved, 0.0, self.max_multiplier), np.float64)
            metrics |= {f"{name}_multiplier": float(multiplier), f"{name}_excess": excess}
        return Weighing(coefficients, offset, metrics), new


@settings
class Baseline:
    """A baseline, taken from every score before PPO sees it; its mean is logged as ``baseline``.

    Attributes:
        kind: ``ema``, the bias-corrected exponential mean of the scores before this rollout and with it;
            ``others``, the mean of the other responses to the same prompt (RLOO: Ahmadian et al. 2024).
        decay: d in [0, 1) of ``ema``, of one rollout.
    """

    kind: Literal["ema", "others"] = "ema"
    decay: Rate = 0.95

    def init(self) -> dict[str, np.ndarray]:
        """The mean of no rollouts."""
        return {"mean": np.zeros((), np.float64), "weight": np.zeros((), np.float64)}

    def update(self, state: Any, scores: np.ndarray, groups: Groups) -> tuple[np.ndarray, Any]:
        """The baseline of each score, float64 [B], and the new state; rows of one group answer one prompt."""
        if self.kind == "others":
            return _mean_of_others(scores, groups), state
        if scores.size == 0:
            return scores, state
        mean = self.decay * state["mean"] + (1.0 - self.decay) * scores.mean()
        weight = self.decay * state["weight"] + (1.0 - self.decay)
        new = {"mean": np.asarray(mean), "weight": np.asarray(weight)}
        return np.full(scores.shape, mean / weight), new


def _mean_of_others(scores: np.ndarray, groups: Groups) -> np.ndarray:
    """0 for a response that is alone."""
    totals, counts = np.bincount(groups, scores), np.bincount(groups)
    return (totals[groups] - scores) / np.maximum(counts[groups] - 1, 1) * (counts[groups] > 1)


def _check_named(setting: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"{setting} must name one of the parts {', '.join(names)}, got {name!r}")


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else 0.0
