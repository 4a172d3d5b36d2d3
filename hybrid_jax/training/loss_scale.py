"""Dynamic loss scaling: what training in float16 needs, whose smallest normal number is 6e-5."""

from __future__ import annotations

from typing import Annotated, Any

import jax.numpy as jnp
from annotated_types import Gt
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Count, Positive, settings

STATE = "loss_scale"  # where ``TrainState.extra`` keeps the state, one for all phases


@struct.dataclass
class LossScaleState:
    """The scale, and how long it has held."""

    scale: Float[Array, ""]  # what the loss is multiplied by
    good_steps: Int[Array, ""]  # finite gradients since the scale last changed


@settings
class DynamicLossScale:
    """Multiplies the loss by a scale before the gradient is taken, and divides the gradient by it, in float32.

        gradient finite       s ← min(s · factor, maximum) after ``growth_interval`` finite ones in a row
        gradient not finite   the update is left out;  s ← max(s / factor, minimum)

    Powers of two change no significant digit of the loss. Source: Micikevicius et al. 2018, arXiv 1710.03740,
    section 3.2.
    """

    initial: Positive = 2.0**15
    growth_interval: Count = 2000  # updates
    factor: Annotated[float, Gt(1)] = 2.0
    minimum: Positive = 1.0
    maximum: Positive = 2.0**24

    def __post_init__(self):
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial must be in [minimum, maximum] = [{self.minimum}, {self.maximum}], got {self.initial}"
            )

    def init(self) -> LossScaleState:
        """The state before the first update."""
        return LossScaleState(  # pyright: ignore[reportCallIssue]
            scale=jnp.asarray(self.initial, jnp.float32), good_steps=jnp.zeros((), jnp.int32)
        )

    def update(self, state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """The state after a gradient that was finite or not."""
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= self.growth_interval
        grown = jnp.where(grows, jnp.minimum(state.scale * self.factor, self.maximum), state.scale)
        shrunk = jnp.maximum(state.scale / self.factor, self.minimum)
        return LossScaleState(  # pyright: ignore[reportCallIssue]
            scale=jnp.where(finite, grown, shrunk), good_steps=jnp.where(grows, 0, good_steps)
        )

    def can_shrink(self, state: LossScaleState) -> Bool[Array, ""]:
        """Tells whether an overflow may still be the scale's doing."""
        return state.scale > self.minimum


def loss_scale_of(model: Any) -> DynamicLossScale | None:
    """The loss scale that a model needs: one exactly where it computes in float16."""
    dtype = getattr(getattr(model, "config", None), "dtype", "float32")
    return DynamicLossScale() if dtype == "float16" else None


def initial_loss_scale(model: Any) -> dict[str, LossScaleState]:
    """Makes what a phase adds to ``TrainState.extra``."""
    scaling = loss_scale_of(model)
    return {} if scaling is None else {STATE: scaling.init()}
