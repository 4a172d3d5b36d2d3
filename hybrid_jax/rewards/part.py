"""One reward among others: what it is, and how it is brought to a common scale."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from hybrid_jax.core.ranges import Finite, settings
from hybrid_jax.rewards.base import REWARDS, DeviceReward, check_reward
from hybrid_jax.rewards.postprocess import (
    NORMALISERS,
    TRANSFORMS,
    Group,
    Groups,
    Normaliser,
    Running,
    Transform,
)
from hybrid_jax.rewards.segments import Level

Bound = Annotated[float, Interval(ge=-math.inf, le=math.inf)]  # an infinite one leaves that side open


@settings
class Part:
    """One reward among others.

    Attributes:
        reward: A text reward or a device reward.
        weight: What it counts; negative turns the reward into a penalty.
        transform: A function of each raw value.
        normalise: Brings the part to mean 0 and standard deviation 1; ``true`` is ``running``.
        clip: ``(lowest, highest)`` value before the weight; None does not clip.
        level: Scores whole responses, or every sentence or token, each placed on its last token; ``potential``
            scores what is written so far and gives the differences, which change no optimum.
    """

    reward: Annotated[Any, REWARDS]
    weight: Finite = 1.0
    transform: Annotated[Transform, TRANSFORMS] | None = None
    normalise: Annotated[Normaliser, NORMALISERS] | None = None
    clip: tuple[Bound, Bound] | None = None
    level: Level = "sequence"

    def __post_init__(self) -> None:
        if isinstance(self.normalise, bool):  # given from Python
            object.__setattr__(self, "normalise", Running() if self.normalise else None)
        check_reward(self.reward)
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip must be (lowest, highest), got {self.clip}")
        if self.normalise and self.on_device:
            raise ValueError("normalise must be false for a reward on tokens, which keeps no state, got true")
        if self.level != "sequence" and self.on_device:
            raise ValueError(f"level must be sequence for a reward on tokens, got {self.level!r}")
        if self.level == "potential" and (self.transform or self.normalise or self.clip):
            raise ValueError("level potential takes a weight alone: its values add up to 0, and must go on to")

    @property
    def on_device(self) -> bool:
        """Tells whether it scores tokens on the device."""
        return isinstance(self.reward, DeviceReward)

    @property
    def is_placed(self) -> bool:
        """Tells whether it scores segments of a response."""
        return self.level != "sequence"

    @property
    def is_in_groups(self) -> bool:
        """Tells whether values are comparable only among the responses to one prompt."""
        return isinstance(self.normalise, Group)

    def unclipped(self, state: Any, raw: np.ndarray, groups: Groups) -> np.ndarray:
        """raw → transform → normaliser, float64."""
        values = np.asarray(raw, np.float64)
        if self.transform is not None:
            values = np.asarray(self.transform(values), np.float64)
        return values if self.normalise is None else self.normalise.apply(state, values, groups=groups)

    def clipped(self, values: Any) -> Any:
        """The values within the clip."""
        return values if self.clip is None else values.clip(*self.clip)

    def transformed(self, raw: Any) -> Any:
        """The raw values after the transform, float64."""
        return raw if self.transform is None else self.transform(raw)
