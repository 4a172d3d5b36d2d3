"""Advantages of actor-critic methods: n-step returns, and V-trace for what another policy sampled.

    n-step    G_t = Σ_{i<n} γ^i R_{t+i} + γ^n V_{t+n}                                    A_t = G_t − V_t
    V-trace   G_t = V_t + Σ_{i≥t} γ^{i−t} (Π_{t≤j<i} c_j) ρ_i (R_i + γ V_{i+1} − V_i)
              A_t = ρ_t (R_t + γ (λ G_{t+1} + (1 − λ) V_{t+1}) − V_t)
              c_j = λ min(c̄, π/b)    ρ_i = min(ρ̄, π/b)

π is the policy that learns and b the one that sampled. Positions count valid tokens alone, as in `gae`. The
value after the last valid token is 0, whether the response ended by itself or was cut by its length: a cut
response is an ended one here, and ``missing_eos_penalty`` is its price.

Sources: Mnih et al. 2016 (arXiv 1602.01783, algorithm S3); Espeholt et al. 2018 (1802.01561, equation 1), with
the λ and the mixed bootstrap of rlax.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.advantages import ADVANTAGES, Unit, counted
from hybrid_jax.core.ranges import Count, Positive, Share, settings

Discount = float | Float[Array, "*batch R"]
Tokens = Float[Array, "*batch R"]


@ADVANTAGES.register("n_step")
@settings
class NStep:
    """Rewards of the next n tokens and the value after them: see `n_step`."""

    steps: Count = 16  # n; at least the tokens of a response takes all rewards and no value
    discount: Share = 1.0  # γ
    per: Unit = "token"  # what γ counts

    needs_value = True
    min_group = 1

    def __call__(
        self,
        rewards: Float[Array, "B R"],
        values: Float[Array, "B R"] | None,
        action_mask: Bool[Array, "B R"],
        group: Int[Array, "B"],
    ) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
        assert values is not None, "n_step reads values"
        discount = counted(self.discount, self.per, action_mask)
        return n_step(rewards, values, action_mask, steps=self.steps, discount=discount)


@ADVANTAGES.register("vtrace")
@settings
class VTrace:
    """V-trace: returns of the policy that learns from responses of another one; see `vtrace`."""

    discount: Share = 1.0  # γ
    trace: Share = 1.0  # λ
    rho_cap: Positive = 1.0  # ρ̄: a larger one learns values nearer to those of π, with more noise
    trace_cap: Positive = 1.0  # c̄: a larger one lets what comes later reach back further, with more noise
    per: Unit = "token"  # what γ and λ count

    needs_value = True
    reads_ratios = True
    min_group = 1

    def __call__(
        self,
        rewards: Float[Array, "B R"],
        values: Float[Array, "B R"] | None,
        action_mask: Bool[Array, "B R"],
        group: Int[Array, "B"],
        log_ratios: Float[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
        """Estimates as every `Advantage`; ``log_ratios`` are log π/b, None where π itself sampled."""
        assert values is not None, "vtrace reads values"
        return vtrace(
            rewards,
            values,
            jnp.zeros_like(rewards) if log_ratios is None else log_ratios,
            action_mask,
            discount=counted(self.discount, self.per, action_mask),
            trace=counted(self.trace, self.per, action_mask),
            rho_cap=self.rho_cap,
            trace_cap=self.trace_cap,
        )


def n_step(
    rewards: Tokens,
    values: Tokens,
    mask: Bool[Array, "*batch R"],
    *,
    steps: int,
    discount: Discount = 1.0,
) -> tuple[Tokens, Tokens]:
    """The n-step returns and their advantages, see the top of this file.

    Args:
        rewards: received after each token.
        values: of the state before each token.
        mask: the tokens that the policy chose.
        steps: n.
        discount: γ, one for all or one for each token.

    Returns:
        Advantages G − V and returns G, both 0 where masked.
    """
    chex.assert_equal_shape((rewards, values, mask))
    order, (rewards_, values_, discounts, valid) = _first(mask, rewards, values, discount)

    def longer(_, returns):  # from returns of k tokens to those of k + 1
        return jnp.where(valid, rewards_ + discounts * _next(returns), 0.0)

    returns = jax.lax.fori_loop(0, min(steps, mask.shape[-1]), longer, values_)
    returns = _back(order, returns)
    return jnp.where(mask, returns - values, 0.0), returns


def vtrace(
    rewards: Tokens,
    values: Tokens,
    log_ratios: Tokens,
    mask: Bool[Array, "*batch R"],
    *,
    discount: Discount = 1.0,
    trace: Discount = 1.0,
    rho_cap: float = 1.0,
    trace_cap: float = 1.0,
    advantage_cap: float | None = None,
) -> tuple[Tokens, Tokens]:
    """The targets of V-trace and the advantages of its policy gradient, see the top of this file.

    The advantage holds the ratio of its token, so its loss is −A log π. Ratios of 1 give `gae` at the same λ.
    The ratios carry no gradient.

    Args:
        rewards: received after each token.
        values: of the state before each token.
        log_ratios: log π/b of each token.
        mask: the tokens that the policy chose.
        discount: γ, one for all or one for each token.
        trace: λ in [0, 1], one for all or one for each token.
        rho_cap: ρ̄.
        trace_cap: c̄.
        advantage_cap: of the ratio in the advantage; None takes ρ̄.

    Returns:
        Advantages A (not whitened) and targets G, both 0 where masked.
    """
    chex.assert_equal_shape((rewards, values, log_ratios, mask))
    log_ratios = jax.lax.stop_gradient(log_ratios)
    order, (rewards_, values_, discounts, valid) = _first(mask, rewards, values, discount)
    trace = jnp.take_along_axis(jnp.broadcast_to(jnp.asarray(trace, rewards.dtype), mask.shape), order, axis=-1)
    ratios = jnp.exp(jnp.where(valid, jnp.take_along_axis(log_ratios, order, axis=-1), 0.0))
    rho, carried = jnp.minimum(ratios, rho_cap), trace * jnp.minimum(ratios, trace_cap)
    surprises = rho * (rewards_ + discounts * _next(values_) - values_)

    def step(later, now):
        surprise, kept = now
        error = surprise + kept * later
        return error, error

    inputs = [jnp.moveaxis(jnp.where(valid, x, 0.0), -1, 0) for x in (surprises, discounts * carried)]
    _, errors = jax.lax.scan(step, jnp.zeros_like(inputs[0][0]), tuple(inputs), reverse=True)
    targets = jnp.where(valid, jnp.moveaxis(errors, 0, -1) + values_, 0.0)
    after = trace * _next(targets) + (1 - trace) * _next(values_)
    weights = jnp.minimum(ratios, rho_cap if advantage_cap is None else advantage_cap)
    advantages = jnp.where(valid, weights * (rewards_ + discounts * after - values_), 0.0)
    return _back(order, advantages), _back(order, targets)


def _first(mask: Bool[Array, "*batch R"], rewards: Tokens, values: Tokens, discount: Discount):
    """An order with the valid tokens first, and rewards, values, discounts and validity in it, 0 behind."""
    order = jnp.argsort(~mask, axis=-1, stable=True)
    valid = jnp.take_along_axis(mask, order, axis=-1)
    arrays = (rewards, values, jnp.broadcast_to(jnp.asarray(discount, rewards.dtype), mask.shape))
    ordered = (jnp.where(valid, jnp.take_along_axis(x, order, axis=-1), 0.0) for x in arrays)
    return order, (*ordered, valid)


def _back(order: Int[Array, "*batch R"], x: Tokens) -> Tokens:
    """Undoes the order of `_first`."""
    return jnp.take_along_axis(x, jnp.argsort(order, axis=-1), axis=-1)


def _next(x: Tokens) -> Tokens:
    """Shifts by one token: item t becomes item t + 1, the last becomes 0."""
    return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)
