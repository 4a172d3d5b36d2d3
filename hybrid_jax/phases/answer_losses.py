"""Losses of answers that were compared: their log-probs, the terms of a loss, and what is logged of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from hybrid_jax.algorithms.kto import KTO
from hybrid_jax.algorithms.preference_losses import PreferenceLoss
from hybrid_jax.algorithms.sppo import SPPO
from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.scoring import target_log_probs
from hybrid_jax.training.update import Groups


@struct.dataclass
class AnswerBatch:
    """Groups of answers to one prompt, the best first and the worst last; as a rule pairs.

    Or single answers, each beside the answer to another prompt.
    """

    rows: TokenBatch  # [B K T]
    # log π_ref of the answers; None where it is computed on the way
    reference: Float[Array, "B K"] | None = None
    good: Bool[Array, "B"] | None = None  # of single answers
    baseline: Float[Array, "B"] | None = None  # z of `KTO`, the same for all rows
    counts: Bool[Array, "B"] | None = None  # groups that are learned; None: all
    wins: Float[Array, "B K"] | None = None  # how often each answer of a group wins, for `SPPO`

    @property
    def tokens(self) -> Any:
        """The tokens of all rows, [B K T]."""
        return self.rows.tokens


def answer_log_probs(
    model: LanguageModel,
    params: Params,
    rows: TokenBatch,
    dropout_key: Array | None = None,
    *,
    temperature: float = 1.0,
    prompt_length: int = 1,
) -> tuple[Float[Array, "B K"], dict[str, Sum]]:
    """log π(y|x) of the answers of rows [B K T], summed over their tokens, and the model's own losses.

    What is no answer (prompts, padding, what stands behind the end) adds neither value nor gradient.

    Args:
        model: of the parameters.
        params: of the model, whole.
        rows: prompts with answers, padded on either side.
        dropout_key: None drops nothing out.
        temperature: of π: ``softmax(logits / temperature)``.
        prompt_length: no answer begins earlier in its row, at least 1.
    """
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    hidden, losses = model.hidden_and_losses(params, flat.tokens, flat.segment_ids, dropout_key=dropout_key)
    states, targets = hidden[:, prompt_length - 1 : -1], flat.tokens[:, prompt_length:]
    found, _ = target_log_probs(model, params, states, targets, temperature=temperature)
    summed = jnp.where(flat.loss_mask[:, prompt_length:], found, 0.0).sum(axis=1)
    return summed.reshape(rows.tokens.shape[:-1]), losses


def mixed_log_probs(
    models: Mapping[str, LanguageModel], shares: Mapping[str, float], params: Groups, rows: TokenBatch
) -> Float[Array, "B K"]:
    """Σ_i a_i log π_i(y|x) of references: log of their geometric mean, but for its normaliser.

    The optimum of E r − β Σ_i a_i KL(π ‖ π_i) with Σ a_i = 1 is that with this one reference; of a pair the
    normaliser cancels.
    """
    found = [
        share * answer_log_probs(models[name], params[f"references/{name}"], rows)[0]
        for name, share in shares.items()
    ]
    return jax.lax.stop_gradient(sum(found[1:], found[0]))


def preference_terms(
    read: PreferenceLoss, sft_coef: float, policy: Float[Array, "B K"], reference: Any, batch: AnswerBatch
) -> tuple[dict[str, Sum], dict[str, Sum]]:
    """The loss of each group of answers, the SFT term of its best one, and what is logged.

    Args:
        read: the loss.
        sft_coef: of the SFT term, which is left out at 0.
        policy: log π of the answers.
        reference: log π_ref of them, [B K]; None for a loss that reads none.
        batch: the answers.
    """
    tokens = batch.rows.loss_mask[..., 1:].sum(axis=-1, dtype=jnp.float32)[:, : policy.shape[1]]
    counts = _counts(batch)
    if isinstance(read, KTO):
        losses, metrics = _answers(read, policy, reference, batch)
    elif isinstance(read, SPPO):
        wins: Any = batch.wins
        ends = jnp.array([0, -1])  # the best and the worst
        losses = read(policy, reference, wins)
        rewards = read.beta * (policy - reference)
        metrics = _margins(policy[:, ends], rewards[:, ends], wins[:, 0] > wins[:, -1])
    else:
        loss: Any = read
        inputs = policy, reference, jnp.maximum(tokens, 1.0)
        losses, metrics = loss(*inputs), _margins(policy, loss.rewards(*inputs), counts)
    terms = {"loss": Sum.of(losses, counts)}
    if sft_coef:
        good = counts if batch.good is None else counts & batch.good
        log_prob, num_tokens = Sum.of(policy[:, 0], good), Sum.of(tokens[:, 0], good)
        terms["sft"] = Sum(total=-log_prob.total, weight=num_tokens.total)
    return terms, metrics


def preference_weights(read: PreferenceLoss, model: LanguageModel, batch: AnswerBatch) -> dict[str, Array]:
    """The weights of the terms on a whole batch, and of the model's own losses."""
    counts = _counts(batch)
    good = counts if batch.good is None else counts & batch.good
    mask = batch.rows.loss_mask[:, 0, 1:] & good[:, None]
    rows = batch.rows.segment_ids[:, :1] if read.learns_from == "answers" else batch.rows.segment_ids
    return {"loss": counts.sum(), "sft": mask.sum(), **dict.fromkeys(model.loss_coefs, (rows > 0).sum())}


def _counts(batch: AnswerBatch) -> Bool[Array, "B"]:
    return jnp.ones(len(batch.rows.tokens), bool) if batch.counts is None else batch.counts


def _margins(
    policy: Float[Array, "B 2"], rewards: Float[Array, "B 2"], counts: Bool[Array, "B"]
) -> dict[str, Sum]:
    """The metrics of pairs, the better first."""
    margin = rewards[:, 0] - rewards[:, 1]
    numbers = {
        "chosen_log_prob": policy[:, 0],
        "rejected_log_prob": policy[:, 1],
        "chosen_reward": rewards[:, 0],
        "rejected_reward": rewards[:, 1],
        "margin": margin,
        "accuracy": 0.5 * (jnp.sign(margin) + 1.0),
    }
    return {name: Sum.of(number, counts) for name, number in numbers.items()}


def _answers(loss: KTO, policy: Array, reference: Any, batch: AnswerBatch) -> tuple[Array, dict[str, Sum]]:
    """The loss of each single answer, and what is logged."""
    good: Any = batch.good
    ratios = policy[:, 0] - reference[:, 0]
    rewards, ahead = loss.beta * ratios, jnp.sign(ratios - batch.baseline)
    everything = jnp.ones(len(good), bool)
    metrics = {
        "chosen_log_prob": Sum.of(policy[:, 0], good),
        "rejected_log_prob": Sum.of(policy[:, 0], ~good),
        "chosen_reward": Sum.of(rewards, good),
        "rejected_reward": Sum.of(rewards, ~good),
        "accuracy": Sum.of(0.5 * (jnp.where(good, ahead, -ahead) + 1.0), everything),
        "kl": Sum.of(jnp.asarray(batch.baseline), everything),
    }
    return loss(ratios, good, jnp.asarray(batch.baseline)), metrics
