"""The reward of a run: a weighted sum of named parts, each normalised and clipped on its own.

The order is fixed: raw -> running normaliser -> clip -> weight -> sum. Normalising each part before the sum
keeps one of large scale from drowning the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import hybrid_jax.rewards.catalogue  # noqa: F401  fills the registry
from hybrid_jax.rewards.base import REWARDS, DeviceReward, StartedReward, start_reward

Moments = dict[str, np.ndarray]  # count, mean, M2 (sum of squared deviations), float64 scalars
RewardState = dict[str, Moments]  # of the normalised parts only


@dataclass(frozen=True)
class Part:
    """One reward within the sum.

    Attributes:
        reward: A text reward or a device reward.
        weight: Factor in the sum; negative turns the reward into a penalty.
        clip: ``(lowest, highest)`` value before the weight; None does not clip.
        normalise: Subtract the mean and divide by the standard deviation of all rollouts so far.
    """

    reward: Annotated[Any, REWARDS]
    weight: float = 1.0
    clip: tuple[float, float] | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        if not callable(self.reward) and not self.on_device:
            raise ValueError(f"reward must be callable or have score_tokens, got {self.reward!r}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be (lowest, highest), got {self.clip}")
        if self.normalise and self.on_device:
            raise ValueError("normalise must be false for a reward on tokens, which keeps no state, got true")

    @property
    def on_device(self) -> bool:
        return isinstance(self.reward, DeviceReward)


@dataclass(frozen=True)
class CompositeReward:
    """``sum over parts of weight * clip(normalise(raw))``, all on texts or all on tokens.

    The normaliser keeps mean and biased variance of every score since the start. Each rollout is merged
    *before* it is normalised, so that the first one is already on scale; the standard deviation has a floor,
    so that a constant reward gives 0. The state is a plain pytree for the checkpoint.
    """

    parts: dict[str, Part]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts must hold at least one reward, got none")
        if len({part.on_device for part in self.parts.values()}) > 1:
            kinds = ", ".join(
                f"{name} on {'tokens' if p.on_device else 'texts'}" for name, p in self.parts.items()
            )
            raise ValueError(f"parts must all score texts or all score tokens, got {kinds}")

    @property
    def on_device(self) -> bool:
        """Whether every part scores tokens: then `score_tokens` is the reward, else `score`."""
        return all(part.on_device for part in self.parts.values())

    def init(self) -> RewardState:
        """Statistics of no rollouts yet."""
        return {name: _no_moments() for name, part in self.parts.items() if part.normalise}

    def score(
        self,
        state: RewardState,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> tuple[np.ndarray, RewardState, dict[str, np.ndarray]]:
        """Scores one rollout; call it once a rollout, for the statistics count every call.

        Returns:
            Scores float32 [B], the new state, and the raw values float32 [B] of each part.

        Raises:
            RewardError: A part failed, see `evaluate_reward`.
        """
        raw = self.raw(prompts, responses, columns)
        return *self.combine(state, raw), raw

    def raw(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, np.ndarray]:
        """The raw values float32 [B] of each part: of any rows, for a row does not depend on the others.

        Raises:
            RewardError: A part failed, see `evaluate_reward`.
        """
        ordered = sorted(self.parts.items(), key=lambda item: not isinstance(item[1].reward, StartedReward))
        started = {n: start_reward(n, p.reward, prompts, responses, columns) for n, p in ordered}
        finished = {n: finish() for n, finish in reversed(started.items())}  # what others compute comes last
        return {name: finished[name] for name in self.parts}

    def combine(self, state: RewardState, raw: Mapping[str, np.ndarray]) -> tuple[np.ndarray, RewardState]:
        """Scores float32 [B] and the new state, from the raw values of a whole rollout."""
        state = {name: _merge(moments, raw[name]) for name, moments in state.items()}
        scores = np.zeros(len(next(iter(raw.values()))), np.float64)
        for name, part in self.parts.items():
            scores += part.weight * _clip(part, _normalise(state.get(name), raw[name]))
        return scores.astype(np.float32), state

    def without_normalisers(self) -> CompositeReward:
        """The same sum on raw values: one scale for all time, for evaluation."""
        return CompositeReward({n: replace(part, normalise=False) for n, part in self.parts.items()})

    def score_tokens(
        self, tokens: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], response_mask: Bool[Array, "B R"]
    ) -> Float[Array, "B"]:
        """The sum of device rewards: pure JAX, float32 [B]."""
        scores = jnp.zeros(tokens.shape[0], jnp.float32)
        for part in self.parts.values():
            raw = part.reward.score_tokens(tokens, attention_mask, response_mask)
            scores += part.weight * _clip(part, raw)
        return scores

    def metrics(self, state: RewardState, raw: Mapping[str, np.ndarray]) -> dict[str, float]:
        """``<part>_mean`` and ``<part>_std`` of the raw values, ``<part>_clip_fraction``: the share clipped.

        Takes the new state and the raw values that `score` returned.
        """
        metrics = {}
        for name, part in self.parts.items():
            metrics[f"{name}_mean"] = float(np.mean(raw[name], dtype=np.float64))
            metrics[f"{name}_std"] = float(np.std(raw[name], dtype=np.float64))
            if part.clip is not None:
                value = _normalise(state.get(name), raw[name])
                metrics[f"{name}_clip_fraction"] = float(np.mean(_clip(part, value) != value))
        return metrics


def _no_moments() -> Moments:
    return {name: np.zeros((), np.float64) for name in ("count", "mean", "M2")}


def _merge(old: Moments, values: np.ndarray) -> Moments:
    """Moments of the old and the new values together (Chan, Golub and LeVeque 1979, pairwise update)."""
    new = np.asarray(values, np.float64)
    if new.size == 0:
        return old
    count = old["count"] + new.size
    shift = new.mean() - old["mean"]
    mean = old["mean"] + shift * new.size / count
    m2 = old["M2"] + np.sum((new - new.mean()) ** 2) + shift**2 * old["count"] * new.size / count
    return {"count": np.asarray(count), "mean": np.asarray(mean), "M2": np.asarray(m2)}


def _normalise(moments: Moments | None, values: np.ndarray) -> np.ndarray:
    """``(values - mean) / std``; the values themselves without moments."""
    if moments is None:
        return np.asarray(values, np.float64)
    # Float32 values that differ by less than this share of their size differ by rounding only.
    floor = 1e-6 * max(1.0, abs(float(moments["mean"])))
    std = math.sqrt(moments["M2"] / max(moments["count"], 1.0))
    return (np.asarray(values, np.float64) - moments["mean"]) / max(std, floor)


def _clip(part: Part, values: Any) -> Any:
    return values if part.clip is None else values.clip(*part.clip)
