"""Tokens under a language model: log-probabilities, entropies, and the states that values are read from.

Phases, evaluation and rewards ask here how likely a model finds given tokens. Item ``t`` of a response array
belongs to response token ``t``: the shift between a state and the token that it predicts is made here.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from hybrid_jax.algorithms.log_probs import LogitsOf, state_log_probs
from hybrid_jax.algorithms.supervised import next_token_targets, token_cross_entropy
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.models.base import LanguageModel, Params


def target_log_probs(
    model: LanguageModel,
    params: Params,
    states: Float[Array, "B X D"],
    targets: Int[Array, "B X"],
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B X"], Float[Array, "B X"] | None]:
    """log π(target) of each target after the state that predicts it, and the entropy of π if it is wanted.

    Args:
        model: whose head reads the states.
        params: of the model.
        states: hidden states.
        targets: the token that follows each state.
        temperature: of π: ``softmax(logits / temperature)``.
        with_entropy: whether the second result is wanted, in nats; else it is None.
    """
    logits_of = _logits_of(model, params, temperature)
    return state_log_probs(logits_of, states, targets, model.vocab_size, with_entropy=with_entropy)


def next_token_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"] | Int[Array, "B T"],
) -> Float[Array, "B T-1"]:
    """log p(token | before) of every token but the first of a row; item ``t`` is of token ``t + 1``."""
    hidden = model.hidden(params, tokens, attention_mask)
    return target_log_probs(model, params, hidden[:, :-1], tokens[:, 1:])[0]


def token_loss(model: LanguageModel, params: Params, hidden: Float[Array, "B T D"], batch: TokenBatch) -> Sum:
    """Σ −log π(token | before) over the targets of a batch, in nats, from its hidden states.

    ``exp`` of its mean is the perplexity. What is no target adds neither value nor gradient.
    """
    targets, mask = next_token_targets(batch.tokens, batch.loss_mask)
    return token_cross_entropy(_logits_of(model, params), hidden[:, :-1], targets, mask, model.vocab_size)


def response_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    response_length: int,
    temperature: float,
) -> Float[Array, "B R"]:
    """log π(token | before) of every response token, read in one pass."""
    states = states_before(model, params, tokens, attention_mask, response_length)
    responses = tokens[:, -response_length:]
    return target_log_probs(model, params, states, responses, temperature=temperature)[0]


def states_before(
    model: LanguageModel,
    params: Params,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
    response_length: int,
) -> Float[Array, "B R D"]:
    """The hidden state before each response token: what predicts it and what its value is read from."""
    return shift_states(model.hidden(params, tokens, attention_mask), response_length)


def shift_states(hidden: Float[Array, "B T D"], response_length: int) -> Float[Array, "B R D"]:
    """The hidden states before the response tokens, out of all of them."""
    return hidden[:, -response_length - 1 : -1]


def _logits_of(model: LanguageModel, params: Params, temperature: float = 1.0) -> LogitsOf:
    """The head, cast once: where the logits are made a stretch at a time, not with every stretch."""
    cast = model.cast(params)
    return lambda states: model.logits(cast, states) / temperature
