"""Learning from preferences: losses on the rewards of responses that people ranked.

The rewards of one prompt's K responses stand in a row, with a rank each: 0 is the best, equal ranks are a tie.
Two responses are the usual pair. All losses are Sums over prompts, one term a prompt, so that a prompt with six
ranked responses (15 pairs) weighs as much as one with two.

A reward of several members [B K M] (an ensemble) learns each on its own weights [B M].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.arrays import Sum


def pair_loss(
    difference: Float[Array, "..."],
    tied: Bool[Array, "..."] | bool = False,
    *,
    label_smoothing: float = 0.0,
    tie_threshold: float | None = None,
) -> Float[Array, "..."]:
    """−log P(label) of one pair, in nats, for d = r(better) − r(worse) − margin.

        better wins      P = σ(d − ν)
        worse wins       P = σ(−d − ν)
        tie              P = (e^2ν − 1) σ(d − ν) σ(−d − ν)

    With ``tie_threshold`` ν > 0 this is Rao and Kupper (1967), whose θ is e^ν; the three sum to 1. None is
    Bradley and Terry (1952), ν = 0, in which a tie is half a win of either side: −(log σ(d) + log σ(−d)) / 2,
    smallest at d = 0, where it is log 2.

    With ``label_smoothing`` ε a win is taken for the opposite with that probability: (1 − ε) loss(win) +
    ε loss(defeat) (cDPO: Mitchell 2023, "A note on DPO with noisy preferences"). Ties are not smoothed.

    The margin is subtracted from the difference (Touvron et al. 2023, 2307.09288, eq. 2). A tie has none.
    """
    nu = 0.0 if tie_threshold is None else tie_threshold
    win, defeat = jax.nn.softplus(nu - difference), jax.nn.softplus(nu + difference)
    tie = 0.5 * (win + defeat) if tie_threshold is None else win + defeat - jnp.log(jnp.expm1(2.0 * nu))
    return jnp.where(tied, tie, (1.0 - label_smoothing) * win + label_smoothing * defeat)


def ranking_loss(
    rewards: Float[Array, "B K M"],
    ranks: Int[Array, "B K"],
    present: Bool[Array, "B K"],
    weights: Float[Array, "B M"],
    margins: Float[Array, "B"] | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    tie_threshold: float | None = None,
) -> Sum:
    """Sum over prompts of weight * mean over the pairs of its responses of `pair_loss`.

    Ouyang et al. 2022 (2203.02155), eq. 1: all C(K, 2) pairs of a prompt are one element of a batch, for they
    are correlated. ``margins`` are those of all pairs of a prompt that are no tie.

    Args:
        rewards: r(x, y_k), float32.
        ranks: 0 is the best.
        present: which of the K there are; what stands elsewhere may be anything.
        weights: of each prompt for each member, at least 0.
        margins: what the better one must be ahead by.
        label_smoothing: in [0, 0.5).
        tie_threshold: see `pair_loss`.

    Returns:
        The Sum over prompts and members, of weight ``weights.sum()``.
    """
    pairs, tied = _pairs(ranks, present), ranks[:, :, None] == ranks[:, None, :]
    given = jnp.broadcast_to(jnp.asarray(margins, rewards.dtype), ranks.shape[:1])[:, None, None]
    safe = jnp.where(present[:, :, None], rewards, 0.0)
    difference = safe[:, :, None] - safe[:, None, :] - jnp.where(tied, 0.0, given)[..., None]
    loss = pair_loss(difference, tied[..., None], label_smoothing=label_smoothing, tie_threshold=tie_threshold)
    return _over_prompts(loss, pairs, weights)


def plackett_luce_loss(
    rewards: Float[Array, "B K M"],
    ranks: Int[Array, "B K"],
    present: Bool[Array, "B K"],
    weights: Float[Array, "B M"],
) -> Sum:
    """−log P(the whole ranking): the best of all that is left is chosen, again and again.

    −Σ_k log( exp r_(k) / Σ_{j ≥ k} exp r_(j) ), with r_(k) the reward of the response of rank k (Plackett 1975;
    Luce 1959). Of two responses it is Bradley-Terry. Needs ranks without ties: two equal ranks would each
    be counted as chosen before the other.
    """
    safe = jnp.where(present[:, :, None], rewards, 0.0)
    left = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, None, :] & present[:, :, None]
    left |= jnp.eye(ranks.shape[1], dtype=bool)  # of an absent one: itself, so that no sum is empty
    choices = jnp.where(left[..., None], safe[:, None, :, :], -jnp.inf)
    loss = jax.nn.logsumexp(choices, axis=2) - safe
    total = jnp.sum(jnp.where(present[..., None], loss, 0.0), axis=1)
    return Sum(total=jnp.sum(weights * total), weight=jnp.sum(weights))


def centring_loss(
    rewards: Float[Array, "B K M"],
    ranks: Int[Array, "B K"],
    present: Bool[Array, "B K"],
    weights: Float[Array, "B M"],
) -> Sum:
    """Sum over prompts of the mean over its pairs of (r_i + r_j)²: Eisenstein et al. 2023 (2312.09244).

    A preference fixes rewards only up to a constant of each prompt; this takes the one that centres them on 0.
    """
    safe = jnp.where(present[:, :, None], rewards, 0.0)
    return _over_prompts(jnp.square(safe[:, :, None] + safe[:, None, :]), _pairs(ranks, present), weights)


def pair_accuracy(rewards: Float[Array, "B K"], ranks: Int[Array, "B K"], present: Bool[Array, "B K"]) -> Sum:
    """Share of pairs in the right order, over all pairs that are no tie; equal rewards count one half."""
    pairs = _pairs(ranks, present) & (ranks[:, :, None] != ranks[:, None, :])
    safe = jnp.where(present, rewards, 0.0)
    difference = safe[:, :, None] - safe[:, None, :]
    return Sum.of(0.5 * (jnp.sign(difference) + 1.0), pairs)


def reward_margin(rewards: Float[Array, "B K"], ranks: Int[Array, "B K"], present: Bool[Array, "B K"]) -> Sum:
    """r(better) − r(worse) over all pairs that are no tie."""
    pairs = _pairs(ranks, present) & (ranks[:, :, None] != ranks[:, None, :])
    safe = jnp.where(present, rewards, 0.0)
    return Sum.of(safe[:, :, None] - safe[:, None, :], pairs)


def _pairs(ranks: Int[Array, "B K"], present: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """Item (i, j): i stands before j in the ranking; every pair once, a tie from its first response."""
    earlier = jnp.arange(ranks.shape[1])[:, None] < jnp.arange(ranks.shape[1])[None, :]
    better = ranks[:, :, None] < ranks[:, None, :]
    tied = ranks[:, :, None] == ranks[:, None, :]
    return (better | (tied & earlier)) & present[:, :, None] & present[:, None, :]


def _over_prompts(
    loss: Float[Array, "B K K M"], pairs: Bool[Array, "B K K"], weights: Float[Array, "B M"]
) -> Sum:
    """The weighted Sum over prompts of the mean over their pairs."""
    count = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)
    total = jnp.sum(jnp.where(pairs[..., None], loss, 0.0), axis=(1, 2)) / count[:, None]
    return Sum(total=jnp.sum(weights * total), weight=jnp.sum(weights))
