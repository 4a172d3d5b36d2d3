"""Mixture of experts: a router sends every token through a few of many MLPs, and drops none.

Tokens are sorted by expert and go through `jax.lax.ragged_dot`, one grouped product for all experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.ranges import NonNegative, Width, settings


@settings
class Experts:
    """Settings of the mixture.

    Attributes:
        count: experts, E.
        per_token: experts that a token goes through.
        width: of an expert's MLP, F.
        normalize: the weights of a token's experts sum to 1.
        layers: which layers have experts; None is all.
        shared_width: of an MLP that every token goes through as well.
        shared_gate: that MLP's output is weighted by a learned gate in (0, 1).
        router_bias: the router has a bias.
        bias: the experts have biases.
        clamped: their gate is `clamped_swiglu`.
        balance_coef: weight of the load-balancing loss in training.
        z_coef: weight of the router's z-loss in training.
    """

    count: Width
    per_token: Width
    width: Width
    normalize: bool = True
    layers: tuple[bool, ...] | None = None
    shared_width: Width | None = None
    shared_gate: bool = False
    router_bias: bool = False
    bias: bool = False
    clamped: bool = False
    balance_coef: NonNegative = 0.0
    z_coef: NonNegative = 0.0
    z_coef: NonNegative = 0.0

    def __post_init__(self):
        if self.per_token > self.count:
            raise ValueError(f"per_token must be at most count={self.count}, got {self.per_token}")


def choose_experts(
    router_logits: Float[Array, "N E"], per_token: int, normalize: bool
) -> tuple[Float[Array, "N K"], Int[Array, "N K"]]:
    """The weights (softmax over all experts, or over the chosen if ``normalize``) and the chosen experts."""
    probs = jax.nn.softmax(router_logits, axis=-1)
    weights, chosen = lax.top_k(probs, per_token)
    if normalize:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    return weights, chosen


@dataclass(frozen=True)
class Dispatch:
    """Copies of the tokens in the order of their experts: N tokens, K experts each."""

    order: Int[Array, "N*K"]  # copy n·K + k of token n, sorted by its expert
    group_sizes: Int[Array, "E"]
    experts: Int[Array, "N*K"]  # of the sorted copies
    per_token: int

    @classmethod
    def of(cls, chosen: Int[Array, "N K"], count: int) -> Dispatch:
        """Sorts the choices [N K] by expert, those of one expert in the order of the tokens."""
        experts = chosen.reshape(-1)
        order = jnp.argsort(experts, stable=True)
        return cls(order, jnp.bincount(experts, length=count), experts[order], chosen.shape[1])

    def scatter(self, x: Float[Array, "N D"]) -> Float[Array, "N*K D"]:
        """The rows of the chosen tokens, sorted by expert."""
        return x[self.order // self.per_token]

    def product(self, x: Array, kernel: Float[Array, "E I O"], bias: Array | None) -> Float[Array, "N*K O"]:
        """``x W_e + b_e``, each copy with its own expert's."""
        y = lax.ragged_dot(x, kernel, self.group_sizes.astype(jnp.int32))
        return y if bias is None else (y + bias[self.experts]).astype(y.dtype)

    def gather(self, y: Float[Array, "N*K D"], weights: Float[Array, "N K"]) -> Float[Array, "N D"]:
        """The weighted sum of each token's copies, in float32."""
        copies = y[jnp.argsort(self.order)].reshape(*weights.shape, -1)
        return jnp.einsum("nk,nkd->nd", weights, copies.astype(jnp.float32))


def clamped_swiglu(gate: Array, up: Array, limit: float = 7.0, slope: float = 1.702) -> Array:
    """``(up + 1) · gate · σ(1.702 gate)`` within ±7: the gate of gpt-oss (gate is only bounded above)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(slope * gate)


def router_losses(
    router_logits: Float[Array, "B T E"], chosen: Int[Array, "B T K"], real: Bool[Array, "B T"]
) -> dict[str, Sum]:
    """Losses that keep a router balanced, as sums over real tokens.

    ``router_balance``: E Σ_e f_e P_e with f_e the share of a row's tokens sent to expert e (times K) and P_e
    its mean probability (Fedus et al. 2021, eq. 4, taken over each row by itself as in DeepSeek-V3, eq. 17);
    K where all experts are used alike. A row weighs as much as it has tokens, so that microbatches and devices
    do not change it. ``router_z``: log² Σ exp(logits) a token (Zoph et al. 2022, eq. 5).
    """
    experts = router_logits.shape[-1]
    probs = jax.nn.softmax(router_logits, -1)
    tokens = jnp.maximum(real.sum(1), 1)[:, None]
    used = jnp.sum(jax.nn.one_hot(chosen, experts), axis=2)  # [B T E]
    share = jnp.sum(jnp.where(real[..., None], used, 0.0), axis=1) / tokens
    mean = jnp.sum(jnp.where(real[..., None], probs, 0.0), axis=1) / tokens
    balance = experts * jnp.sum(share * mean, -1)  # [B]
    z = jnp.square(jax.nn.logsumexp(router_logits, -1))
    return {
        "router_balance": Sum.of(jnp.broadcast_to(balance[:, None], real.shape), real),
        "router_z": Sum.of(z, real),
    }
