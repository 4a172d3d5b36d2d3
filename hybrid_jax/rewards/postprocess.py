"""Changes to the raw values of one reward before they are weighed: a transform, then a normaliser.

A transform is a plain function of one number. A normaliser sees a whole rollout and may remember: an
``init``/``update`` pair over a pytree of numpy scalars, which goes into the checkpoint.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Protocol

import numpy as np
from annotated_types import Interval

from hybrid_jax.core.ranges import Finite, Positive, Rate, settings
from hybrid_jax.core.registry import Registry

Moments = dict[str, np.ndarray]  # float64 scalars
Groups = np.ndarray  # int [B]: the number of the prompt that each row answers; equal texts have two numbers


class Transform(Protocol):
    """Written in the array's own namespace, so that it takes numpy arrays and, inside jit, JAX arrays."""

    def __call__(self, values: Any) -> Any: ...


TRANSFORMS: Registry[Any] = Registry("transform")


@TRANSFORMS.register("affine")
@settings
class Affine:
    """``scale · r + shift``."""

    scale: Finite = 1.0  # factor
    shift: Finite = 0.0  # added after it

    def __call__(self, values: Any) -> Any:
        return self.scale * values + self.shift


@TRANSFORMS.register("log_sigmoid")
@settings
class LogSigmoid:
    """``log σ((r − reference) / scale)``, in (−∞, 0): what is good enough already earns little more.

    A sum of such terms is the logarithm of "all parts are good" (Wang et al. 2024, arXiv 2402.00742,
    "LSC"), so no part can make up for another one.

    Attributes:
        reference: the value from which on a response is good enough, of the SFT model for instance.
        scale: units of the reward; 1 for log-odds, such as the reward of a preference model.
    """

    reference: Finite = 0.0
    scale: Positive = 1.0

    def __call__(self, values: Any) -> Any:
        xp, shifted = values.__array_namespace__(), (values - self.reference) / self.scale
        # log σ(x) = min(x, 0) − log(1 + e^−|x|): exact for either sign
        return xp.minimum(shifted, 0.0) - xp.log1p(xp.exp(-abs(shifted)))


@TRANSFORMS.register("logit")
@settings
class Logit:
    """``log p / (1 − p)`` of a probability, which is kept ``margin`` away from 0 and 1.

    A saturated probability gives no direction to learn in; its log-odds do.
    """

    margin: Annotated[float, Interval(gt=0, lt=0.5)] = 1e-6  # least distance of p from 0 and from 1

    def __call__(self, values: Any) -> Any:
        xp, p = values.__array_namespace__(), values.clip(self.margin, 1.0 - self.margin)
        return xp.log(p) - xp.log1p(-p)


class Normaliser(Protocol):
    """Brings a reward to mean 0 and standard deviation 1, whatever its units."""

    def init(self) -> Any:
        """The state before any rollout."""
        ...

    def update(self, state: Any, values: np.ndarray) -> Any:
        """The state with one more rollout; called once for each, not for each minibatch."""
        ...

    def apply(self, state: Any, values: np.ndarray, groups: Groups) -> np.ndarray:
        """The values float64 [B] (or [B R], NaN where there is none) on their new scale.

        Args:
            state: with this rollout.
            values: of the rollout.
            groups: rows with one number answer one prompt.
        """
        ...


NORMALISERS: Registry[Any] = Registry("normaliser", default="running")


@NORMALISERS.register("running")
@settings
class Running:
    """``(r − mean) / std`` over every score since the start (Welford; Chan, Golub and LeVeque 1979).

    Each rollout is merged *before* it is normalised, so that the first one is already on scale. The standard
    deviation (biased) has a floor, so that a constant reward gives 0.
    """

    def init(self) -> Moments:
        """Moments of no scores."""
        return _zeros("count", "mean", "M2")

    def update(self, state: Moments, values: np.ndarray) -> Moments:
        """Merges the moments of a rollout."""
        new = _present(values)
        if new.size == 0:
            return state
        count = state["count"] + new.size
        shift = new.mean() - state["mean"]
        mean = state["mean"] + shift * new.size / count
        m2 = state["M2"] + np.sum((new - new.mean()) ** 2) + shift**2 * state["count"] * new.size / count
        return {"count": np.asarray(count), "mean": np.asarray(mean), "M2": np.asarray(m2)}

    def apply(self, state: Moments, values: np.ndarray, groups: Groups) -> np.ndarray:
        """Standardises by the moments of all scores."""
        variance = state["M2"] / max(state["count"], 1.0)
        return _standardise(values, state["mean"], math.sqrt(variance))


@NORMALISERS.register("ema")
@settings
class Ema:
    """``(r − mean) / std`` with moments that forget: for a reward whose scale moves while the policy learns.

        m ← d m + (1 − d) mean(r),   s ← d s + (1 − d) mean(r²),   both divided by 1 − dᵗ

    Without the division the first values would be drawn to 0 (a constant 4 would read 0.4 at d = 0.9). These
    are the statistics of PopArt (van Hasselt et al. 2016).

    Attributes:
        decay: d in [0, 1), of one rollout.
    """

    decay: Rate = 0.95

    def init(self) -> Moments:
        """Moments of no rollouts."""
        return _zeros("weight", "mean", "spread")

    def update(self, state: Moments, values: np.ndarray) -> Moments:
        """Moves the moments towards those of a rollout."""
        new = _present(values)
        if new.size == 0:
            return state
        # The weighted mean and variance themselves, since E[r²] − E[r]² cancels where the mean is large.
        keep, mine = self.decay * state["weight"], 1.0 - self.decay
        weight = keep + mine
        shift = new.mean() - state["mean"]
        mean = state["mean"] + shift * mine / weight
        spread = (keep * state["spread"] + mine * new.var() + shift**2 * keep * mine / weight) / weight
        return {"weight": np.asarray(weight), "mean": np.asarray(mean), "spread": np.asarray(spread)}

    def apply(self, state: Moments, values: np.ndarray, groups: Groups) -> np.ndarray:
        """Standardises by the corrected moments."""
        return _standardise(values, state["mean"], math.sqrt(state["spread"]))


@NORMALISERS.register("group")
@settings
class Group:
    """``(r − mean) / std`` among the responses to the same prompt (GRPO: Shao et al. 2024).

    Needs ``samples_per_prompt`` above 1: a response that is alone gets 0. Two prompts of one text are two.
    """

    def init(self) -> Moments:
        """No state."""
        return {}

    def update(self, state: Moments, values: np.ndarray) -> Moments:
        """No state."""
        return state

    def apply(self, state: Moments, values: np.ndarray, groups: Groups) -> np.ndarray:
        """Standardises each group of rows by itself."""
        result = np.array(values, np.float64)
        for number in np.unique(groups):
            rows = groups == number
            own = _present(values[rows])
            if own.size:
                result[rows] = _standardise(values[rows], own.mean(), own.std())
        return result


def _zeros(*names: str) -> Moments:
    return {name: np.zeros((), np.float64) for name in names}


def _present(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return values[~np.isnan(values)]


def _standardise(values: np.ndarray, mean: Any, std: float) -> np.ndarray:
    # Float32 values that differ by less than this share of their size differ by rounding only.
    floor = 1e-6 * max(1.0, abs(float(mean)))
    return (np.asarray(values, np.float64) - mean) / max(std, floor)
