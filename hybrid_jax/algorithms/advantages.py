"""Advantage estimators: how much better each token did than expected, from the rewards of a rollout.

Conventions of every [B R] array: item ``t`` belongs to response token ``t``; ``values[b, t]`` is the value of
the state before it, ``rewards[b, t]`` is received after it. A mask may have holes (the user's turns of a
dialogue); masked items may hold anything and come out as 0.
"""

from __future__ import annotations

from typing import Literal, Protocol

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import masked_mean, masked_sum
from hybrid_jax.core.ranges import Share, settings
from hybrid_jax.core.registry import Registry


class Advantage(Protocol):
    """An estimator: a frozen dataclass of settings, registered in `ADVANTAGES` or named ``my_module:Mine``.

    One that compares the policy with the one that sampled has ``reads_ratios = True``, and takes the log-ratios
    of the tokens, [B R], as a fifth argument.
    """

    @property
    def needs_value(self) -> bool:
        """Tells whether it reads values. A value head, or network, exists only where this is true."""
        ...

    @property
    def min_group(self) -> int:
        """How many answers to one prompt it needs."""
        ...

    def __call__(
        self,
        rewards: Float[Array, "B R"],
        values: Float[Array, "B R"] | None,
        action_mask: Bool[Array, "B R"],
        group: Int[Array, "B"],
    ) -> tuple[Float[Array, "B R"], Float[Array, "B R"] | None]:
        """Advantages, 0 where masked, and the returns that values should learn; pure JAX.

        Args:
            rewards: received after each token, the KL penalty included.
            values: of the state before each token; None unless it `needs_value`.
            action_mask: the tokens that the policy chose.
            group: rows that answer one prompt share a number, from 0 to B − 1.
        """
        ...


ADVANTAGES: Registry[Advantage] = Registry("advantage", needs=("needs_value", "min_group"))


Unit = Literal["token", "turn"]  # turn: γ and λ act behind the last token of each turn alone, and are 1 within


def counted(rate: float, per: Unit, mask: Bool[Array, "*batch R"]) -> float | Float[Array, "*batch R"]:
    """A discount or a trace for each token: where a turn counts, it acts behind the last token of one alone.

    A turn is a stretch of tokens that the policy chose: between two of them lies what it read.
    """
    if per == "token":
        return rate
    goes_on = jnp.concatenate([mask[..., 1:], jnp.zeros_like(mask[..., :1])], axis=-1)
    return jnp.where(mask & ~goes_on, rate, 1.0)


def reads_ratios(advantage: Advantage) -> bool:
    """Tells whether an estimator takes log-ratios."""
    return getattr(advantage, "reads_ratios", False)


@ADVANTAGES.register("gae")
@settings
class GAE:
    """Generalised advantage estimation over the values of a critic: see `gae`."""

    discount: Share = 1.0  # γ; below 1 it shrinks what long responses earn
    trace: Share = 0.95  # λ; 1 trusts the rewards alone, 0 the values after one token
    per: Unit = "token"  # what γ and λ count

    needs_value = True
    min_group = 1

    def __call__(
        self,
        rewards: Float[Array, "B R"],
        values: Float[Array, "B R"] | None,
        action_mask: Bool[Array, "B R"],
        group: Int[Array, "B"],
    ) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
        assert values is not None, "gae reads values"
        discount, trace = (counted(x, self.per, action_mask) for x in (self.discount, self.trace))
        return gae(rewards, values, action_mask, discount=discount, trace=trace)


def gae(
    rewards: Float[Array, "*batch R"],
    values: Float[Array, "*batch R"],
    mask: Bool[Array, "*batch R"],
    *,
    discount: float | Float[Array, ""] | Float[Array, "*batch R"] = 1.0,
    trace: float | Float[Array, ""] | Float[Array, "*batch R"] = 0.95,
) -> tuple[Float[Array, "*batch R"], Float[Array, "*batch R"]]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16).

        δ_t = R_t + γ V_{t'} − V_t        A_t = δ_t + γ λ A_{t'}        G_t = A_t + V_t

    where t' is the next *valid* token: A and V are carried across masked ones, which cost no discount. After
    the last valid token the value is 0 (the response has ended, by choice or by length).

    Args:
        discount: γ in [0, 1]; below 1 it shrinks what long responses earn. One for all, or one for each token:
            item ``t`` is between it and the next valid token.
        trace: λ in [0, 1], likewise.

    Returns:
        Advantages A (not whitened) and returns G, both 0 where masked.
    """

    chex.assert_equal_shape((rewards, values, mask))

    # Backwards, each item from the next valid one: a masked item hands on what it was given.
    def step(later, now):
        later_advantage, later_value = later
        reward, value, valid, discount, trace = now
        advantage = reward + discount * later_value - value + discount * trace * later_advantage
        return (jnp.where(valid, advantage, later_advantage), jnp.where(valid, value, later_value)), advantage

    rates = (jnp.broadcast_to(jnp.asarray(rate, values.dtype), values.shape) for rate in (discount, trace))
    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask, *rates))
    nothing = jnp.zeros(values.shape[:-1], jnp.result_type(rewards, values))
    _, advantages = jax.lax.scan(step, (nothing, nothing), time_first, reverse=True)
    advantages = jnp.where(mask, jnp.moveaxis(advantages, 0, -1), 0.0)
    return advantages, jnp.where(mask, advantages + values, 0.0)


@ADVANTAGES.register("returns")
@settings
class Returns:
    """The return from a token on, G_t = Σ γ^(t' − t) R_t': REINFORCE (Williams 1992), without a critic.

    Together with ``whiten_advantages`` and the KL in the reward it is REINFORCE++ (Hu 2025, arXiv 2501.03262).
    A baseline that runs along is the reward's: ``reward.baseline``.
    """

    discount: Share = 1.0  # γ
    per: Unit = "token"  # what γ counts
    baseline: Literal["none", "rollout"] = "none"  # rollout takes the mean of all G_t of the rollout away

    needs_value = False
    min_group = 1

    def __call__(
        self,
        rewards: Float[Array, "B R"],
        values: Float[Array, "B R"] | None,
        action_mask: Bool[Array, "B R"],
        group: Int[Array, "B"],
    ) -> tuple[Float[Array, "B R"], None]:
        nothing = jnp.zeros_like(rewards)
        discount = counted(self.discount, self.per, action_mask)
        returns, _ = gae(rewards, nothing, action_mask, discount=discount, trace=1.0)
        if self.baseline == "rollout":
            returns = jnp.where(action_mask, returns - masked_mean(returns, action_mask), 0.0)
        return returns, None


def whiten(x: Float[Array, "..."], mask: Bool[Array, "..."], *, shift_mean: bool = True) -> Float[Array, "..."]:
    """Scales the valid items, all together, to standard deviation 1 and mean 0; masked items become 0.

    The variance has Bessel's correction (divided by n − 1). Without ``shift_mean`` the mean stays where it
    was, for rewards, whose sign matters. One item, or equal ones, give 0 (or their mean).
    """
    mean = masked_mean(x, mask)
    centred = jnp.where(mask, x - mean, 0.0)
    # Once more: the mean is off by a rounding, which the division would make a signal where all are equal.
    error = masked_mean(centred, mask)
    mean, centred = mean + error, jnp.where(mask, centred - error, 0.0)
    variance = masked_sum(jnp.square(centred), mask) / jnp.maximum(jnp.sum(mask) - 1, 1)
    whitened = centred * jax.lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)
