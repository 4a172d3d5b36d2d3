"""How strongly the policy is held to its reference: the coefficient β of the KL penalty.

A control is its own config; its state is a scalar array, so that it lives in the checkpoint and under `jit`.
"""

from __future__ import annotations

from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import NonNegative, Positive, settings
from hybrid_jax.core.registry import Registry

State = Float[Array, ""]


class KLControl(Protocol):
    """A way to set β, an entry of `KL_CONTROLS`: its settings, and pure functions of its state."""

    def init(self) -> State:
        """The state before the first rollout."""
        ...

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """The state after ``num_samples`` responses whose KL, in nats a response, has that mean."""
        ...

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β for the next rollout."""
        ...


KL_CONTROLS: Registry[KLControl] = Registry("KL control")


@KL_CONTROLS.register("fixed")
@settings
class FixedKL:
    """β = ``coef``, always."""

    coef: NonNegative = 0.05  # β, the reward that a nat of KL costs

    def init(self) -> State:
        """β itself."""
        return jnp.asarray(self.coef, jnp.float32)

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """The same state."""
        return state

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β."""
        return state


@KL_CONTROLS.register("adaptive")
@settings
class AdaptiveKL:
    """Proportional control towards a target KL (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

        e = clip(KL/target − 1, −0.2, 0.2)        β ← β (1 + e · min(n/horizon, 1))

    The bound on n/horizon keeps β positive for any batch; the paper's batches never reach it.
    """

    initial: Positive = 0.05  # β of the first step
    target: Positive = 6.0  # KL to hold, in nats summed over a response
    horizon: Positive = 10_000.0  # responses over which β follows; fewer react faster

    def init(self) -> State:
        """The initial β."""
        return jnp.asarray(self.initial, jnp.float32)

    def update(self, state: State, kl_sequence_mean: Float[Array, ""], num_samples: int | Array) -> State:
        """β moved towards the target."""
        error = jnp.clip(kl_sequence_mean / self.target - 1.0, -0.2, 0.2)
        return state * (1.0 + error * jnp.minimum(num_samples / self.horizon, 1.0))

    def coefficient(self, state: State) -> Float[Array, ""]:
        """β."""
        return state
