"""Shaping of rewards that keeps the optimum: potentials."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def potential_shaping(
    potentials: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    discount: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B R"]:
    """F_t = γ Φ(s_{t+1}) − Φ(s_t), with Φ = 0 behind the last response token.

    Added to the rewards it changes the return of every response by −Φ(s_0), which no
    policy can change, so the optimal policy stays what it was (Ng, Harada and Russell 1999,
    theorem 1), for returns of the same γ.

    Args:
        potentials: Φ of the state *before* each response token, as values are; masked items may hold anything.
        mask: The response tokens; it may have holes, the next state is that of the next valid token.
        discount: γ in [0, 1], that of the returns.

    Returns:
        What to add to the reward received after each token; 0 where masked.
    """

    def step(later, now):
        potential, valid = now
        return jnp.where(valid, potential, later), jnp.where(valid, discount * later - potential, 0.0)

    behind_the_last = jnp.zeros(potentials.shape[0], potentials.dtype)
    _, shaped = jax.lax.scan(step, behind_the_last, (potentials.T, mask.T), reverse=True)
    return shaped.T
