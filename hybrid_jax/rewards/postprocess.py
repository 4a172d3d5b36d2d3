"""What is done to the scores [B] of a rollout after the rewards, on NumPy and on JAX arrays alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np
from jaxtyping import Array, Bool, Float, Int


def has_eos(
    tokens: Int[Array, "B R"], response_mask: Bool[Array, "B R"], eos_ids: Sequence[int]
) -> Bool[Array, "B"]:
    """Whether a response ends by itself: one of its own tokens, not of its padding, ends the sequence."""
    return (reduce(or_, [tokens == eos_id for eos_id in eos_ids], tokens != tokens) & response_mask).any(axis=1)


def penalise_missing_eos(
    scores: Float[Array, "B"], has_eos: Bool[Array, "B"], penalty: float | None
) -> Float[Array, "B"]:
    """Subtracts ``penalty`` from the score of a response that was cut off before its end; None is off."""
    return scores if penalty is None else scores - np.float32(penalty) * ~has_eos


def clip_scores(scores: Float[Array, "B"], score_range: tuple[float, float] | None) -> Float[Array, "B"]:
    """Limits scores to ``(lowest, highest)``; None is off."""
    return scores if score_range is None else scores.clip(*score_range)
