"""Advantages without a critic: what a response earned, against the other answers to its prompt.

R_b is all that response b received, G the number of answers to its prompt. The advantage of all tokens of b is

    leave_one_out   R_b − mean of the others                       (RLOO)
    group           (R_b − mean) / (std + 1e-4), or without std     (GRPO; Dr. GRPO)
    pass_at_k       E[max R over k answers of which b is one] − E[max R over k answers]

The first is G/(G − 1) times the second without std. Masked tokens have the advantage 0. A row without
tokens is no member of its group; one whose group has lost all others has the advantage 0.

Sources: Kool et al. 2019, Ahmadian et al. 2024 (arXiv 2402.14740); Shao et al. 2024 (2402.03300); Liu et al.
2025 (2503.20783); Chen et al. 2025 (2508.10751), of whose rewards 0 and 1 pass_at_k is the numerator.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.advantages import ADVANTAGES
from hybrid_jax.core.arrays import masked_mean, masked_sum
from hybrid_jax.core.ranges import Count, settings

EPSILON = 1e-4  # added to a standard deviation, as in the code of GRPO

Rewards = Float[Array, "B R"]
Estimated = tuple[Float[Array, "B R"], None]


@ADVANTAGES.register("leave_one_out")
@settings
class LeaveOneOut:
    """R − mean R of the other answers to the prompt (RLOO)."""

    needs_value = False
    min_group = 2

    def __call__(
        self, rewards: Rewards, values: Rewards | None, action_mask: Bool[Array, "B R"], group: Int[Array, "B"]
    ) -> Estimated:
        earned = _earned(rewards, action_mask)
        count, total = _count(action_mask, group), _of_group(earned, group)
        others = (total - earned) / jnp.maximum(count - 1, 1)
        return _for_tokens(jnp.where(count > 1, earned - others, 0.0), action_mask), None


@ADVANTAGES.register("group")
@settings
class GroupRelative:
    """(R − mean R) / (std R + 1e-4) over the answers to the prompt (GRPO); without the division Dr. GRPO."""

    scale: Literal["group", "rollout", "none"] = "group"  # whose standard deviation (n − 1) divides R − mean

    needs_value = False
    min_group = 2

    def __call__(
        self, rewards: Rewards, values: Rewards | None, action_mask: Bool[Array, "B R"], group: Int[Array, "B"]
    ) -> Estimated:
        earned = _earned(rewards, action_mask)
        present, count = action_mask.any(axis=1), jnp.maximum(_count(action_mask, group), 1)
        centred = jnp.where(present, earned - _of_group(earned, group) / count, 0.0)
        # Once more: the mean is off by a rounding, which a small deviation would make a signal.
        centred = jnp.where(present, centred - _of_group(centred, group) / count, 0.0)
        match self.scale:
            case "group":
                deviation = jnp.sqrt(_of_group(jnp.square(centred), group) / jnp.maximum(count - 1, 1))
                centred = centred / (deviation + EPSILON)
            case "rollout":
                away = earned - masked_mean(earned, present)
                variance = masked_sum(jnp.square(away), present) / jnp.maximum(present.sum() - 1, 1)
                centred = centred / (jnp.sqrt(variance) + EPSILON)
        return _for_tokens(centred, action_mask), None


@ADVANTAGES.register("pass_at_k")
@settings
class PassAtK:
    """The gain of an answer for the best of k answers: a rare good one counts much, not so in a mean."""

    k: Count = 4  # answers of which the best counts; fewer than the answers to a prompt

    needs_value = False

    @property
    def min_group(self) -> int:
        """One more than k answers: of k, every one is in the only set, and none gains."""
        return self.k + 1

    def __call__(
        self, rewards: Rewards, values: Rewards | None, action_mask: Bool[Array, "B R"], group: Int[Array, "B"]
    ) -> Estimated:
        earned = _earned(rewards, action_mask)
        best_with = _best_with(earned, action_mask.any(axis=1), group, self.k)
        # Over the answers of a group, the mean of the best with each is the best of any k.
        mean = _of_group(best_with, group) / jnp.maximum(_count(action_mask, group), 1)
        return _for_tokens(best_with - mean, action_mask), None


def _best_with(
    earned: Float[Array, "B"], present: Bool[Array, "B"], group: Int[Array, "B"], k: int
) -> Float[Array, "B"]:
    """E[max R over k answers to the prompt of b, of which b is one].

    In ascending order, answer j is the best of C(j − 1, k − 1) sets of b = j, and of C(j − 2, k − 2) sets with
    an earlier b, out of the C(G − 1, k − 1) sets that hold b.
    """
    index = jnp.arange(len(earned))
    together = (group[:, None] == group[None, :]) & present[:, None] & present[None, :]
    before = (earned[None, :] < earned[:, None]) | (
        (earned[None, :] == earned[:, None]) & (index[None] < index[:, None])
    )
    below = jnp.sum(together & before, axis=1)  # answers of the group that stand before
    count = jnp.sum(together, axis=1)
    own = _choices(below, count - 1, k - 1)
    if k == 1:
        return own * earned
    # Of j, for each b before it; C(G − 1, k − 1) = C(G − 1, k − 2) (G − k + 1) / (k − 1).
    later = _choices(below - 1, count - 1, k - 2) * (k - 1) / jnp.maximum(count - k + 1, 1)
    is_later = together & before.T
    best = own * earned + jnp.sum(jnp.where(is_later, (later * earned)[None, :], 0.0), axis=1)
    return jnp.where(count >= k, best, 0.0)  # a group that lost rows may have fewer


def _choices(n: Int[Array, "B"], of: Int[Array, "B"], k: int) -> Float[Array, "B"]:
    """C(n, k) / C(of, k), factor by factor: each alone may be larger than a float32."""
    product = jnp.ones(n.shape, jnp.float32)
    for i in range(k):
        product = product * jnp.maximum(n - i, 0) / jnp.maximum(of - i, 1)
    return product


def _earned(rewards: Rewards, mask: Bool[Array, "B R"]) -> Float[Array, "B"]:
    return jnp.sum(jnp.where(mask, rewards, 0.0), axis=1)


def _count(mask: Bool[Array, "B R"], group: Int[Array, "B"]) -> Float[Array, "B"]:
    """The answers in the group of each row; one that is left out has no token, and is none of them."""
    return _of_group(mask.any(axis=1).astype(jnp.float32), group)


def _of_group(x: Float[Array, "B"], group: Int[Array, "B"]) -> Float[Array, "B"]:
    """The sum over the group of each row."""
    return jax.ops.segment_sum(x, group, num_segments=len(x))[group]


def _for_tokens(x: Float[Array, "B"], mask: Bool[Array, "B R"]) -> Float[Array, "B R"]:
    return jnp.where(mask, x[:, None], 0.0)
