"""Learning from examples: cross-entropy of the next token."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.log_probs import LogitsOf, state_log_probs
from hybrid_jax.core.arrays import Sum


def next_token_targets(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T-1"], Bool[Array, "B T-1"]]:
    """The targets of ``logits[:, :-1]``, and which of them count: the one place where the shift lives.

    Item ``t`` of the results is token ``t + 1``. The first token of a row is never a target.
    """
    return tokens[:, 1:], loss_mask[:, 1:]


def token_cross_entropy(
    logits_of: LogitsOf,
    states: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    vocab_size: int,
) -> Sum:
    """Σ −log π(target) over the valid tokens, in nats; ``exp`` of its mean is the perplexity.

    ``logits_of(states)[b, t]`` scores ``targets[b, t]`` (see `next_token_targets`), and is never in memory as a
    whole where it is large (`log_probs.state_log_probs`). Masked positions contribute neither value nor
    gradient, whatever they hold.
    """
    return Sum.of(-state_log_probs(logits_of, states, targets, vocab_size)[0], mask)
