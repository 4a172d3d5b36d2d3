"""Aggregation of the losses of tokens, and correction for tokens that another policy sampled.

A loss is ``Σ_bt w_bt l_bt / Σ_b d_b``, with weights w and shares d that no parameter changes. They are known
before a rollout is divided into minibatches, so that no division changes what a token weighs:

    token_mean      w = 1                             d = tokens of the response     (DAPO; also PPO)
    sequence_mean   w = 1 / tokens of the response    d = 1                          (GRPO)
    prompt_mean     w = 1 / tokens of the group       d = the response's part of 1   (ScaleRL)
    sequence_sum    w = 1                             d = 1                          (RLOO)
    budget          w = 1 / tokens it might have      d = 1                          (Dr. GRPO)

Sources: Shao et al. 2024 (arXiv 2402.03300); Ahmadian et al. 2024 (2402.14740); Yu et al. 2025 (2503.14476);
Liu et al. 2025 (2503.20783); Khatri et al. 2025 (2510.13786).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.core.ranges import Positive, settings

Aggregation = Literal["token_mean", "sequence_mean", "prompt_mean", "sequence_sum", "budget"]


def loss_weights(
    kind: Aggregation, mask: Bool[Array, "B R"], group: Int[Array, "B"]
) -> tuple[Float[Array, "B R"], Float[Array, "B"]]:
    """The weights w of the tokens, 0 where masked, and the shares d of the responses.

    A response without a token, such as one that is left out, has no share.

    Args:
        kind: see the top of this file.
        mask: the tokens that the policy chose; ``budget`` allows R of them.
        group: rows that answer one prompt share a number, from 0 to B − 1.
    """
    tokens = mask.sum(axis=1, dtype=jnp.float32)
    ones, present = mask.astype(jnp.float32), (tokens > 0).astype(jnp.float32)
    match kind:
        case "token_mean":
            return ones, tokens
        case "sequence_sum":
            return ones, present
        case "budget":
            return ones / mask.shape[1], present
        case "sequence_mean":
            return ones / jnp.maximum(tokens, 1)[:, None], present
    of_group = jax.ops.segment_sum(tokens, group, num_segments=len(mask))[group]
    return ones / jnp.maximum(of_group, 1)[:, None], tokens / jnp.maximum(of_group, 1)


@settings
class Correction:
    """The weight of a token that another policy sampled than the one that begins to learn from it.

    Responses may come from an older policy (``rollout_ahead``, slow actors) or from a sampler whose numbers
    differ. Ratios then start from the policy at the beginning of the step, and each loss is multiplied by that
    policy's probability over the one that sampled, within the cap.

    Attributes:
        kind: ``truncated`` cuts the ratio of each token at the cap; ``sequence_mask`` multiplies by the ratio
            of the whole response, and leaves out a response whose ratio is above the cap.
        cap: the largest ratio.
    """

    kind: Literal["truncated", "sequence_mask"] = "truncated"
    cap: Positive = 2.0

    def __call__(
        self,
        log_probs: Float[Array, "B R"],
        behaviour_log_probs: Float[Array, "B R"],
        mask: Bool[Array, "B R"],
    ) -> Float[Array, "B R"]:
        """The factor of each token, without gradient; 0 where masked.

        Args:
            log_probs: of the policy at the beginning of the step.
            behaviour_log_probs: of the policy that sampled.
            mask: the tokens that were chosen.
        """
        log_ratios = jnp.where(mask, log_probs - behaviour_log_probs, 0.0)
        if self.kind == "sequence_mask":
            log_ratios = jnp.broadcast_to(log_ratios.sum(axis=1, keepdims=True), mask.shape)
        ratios = jax.lax.stop_gradient(jnp.exp(log_ratios))
        if self.kind == "truncated":
            return jnp.where(mask, jnp.minimum(ratios, self.cap), 0.0)
        return jnp.where(mask & (ratios <= self.cap), ratios, 0.0)
