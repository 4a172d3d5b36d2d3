"""Losses of a classifier: one label a text, or one number."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybrid_jax.core.arrays import Sum


def label_cross_entropy(
    logits: Float[Array, "B Y"],
    labels: Int[Array, "B"],
    class_weights: Float[Array, "Y"],
    label_smoothing: float = 0.0,
) -> Sum:
    """Σ_b w(y_b) · −Σ_c q_b(c) log softmax(logits_b)(c), in nats, over Σ_b w(y_b).

    q_b is (1 − ε) on the label and ε / Y on every class (Szegedy et al. 2016, section 7). Weights are of the
    row's own label, so that weights w, or k copies of the rows of a class, are the same.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    of_label = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    loss = -(1 - label_smoothing) * of_label - label_smoothing * log_probs.mean(axis=1)
    weights = class_weights[labels]
    return Sum(total=jnp.sum(weights * loss), weight=jnp.sum(weights))  # pyright: ignore[reportCallIssue]


def squared_error(predictions: Float[Array, "B"], targets: Float[Array, "B"]) -> Sum:
    """Σ (prediction − target)², over the number of rows."""
    errors = jnp.square(predictions.astype(jnp.float32) - targets)
    return Sum.of(errors, jnp.ones_like(errors, bool))
