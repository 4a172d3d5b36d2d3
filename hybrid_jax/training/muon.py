"""Muon's direction for matrices, and which parameters are some."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hybrid_jax.models.param_axes import is_matrix, path_of


def scale_by_muon(beta: float, num_iterations: int) -> optax.GradientTransformation:
    """Muon's direction for a tree of matrices [I O] or stacks of them [E I O], of root mean square about 0.2.

    m ← β m + (1 − β) g      update = 0.2 √max(I, O) · orthogonal((1 − β) g + β m)     (Nesterov)
    """

    def update(updates: Any, state: Any, params: Any = None):
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.trace, updates)
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates)
        scaled = jax.tree.map(
            lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * _orthogonal(x, num_iterations), ahead
        )
        return scaled, optax.TraceState(trace=momentum)

    return optax.GradientTransformation(optax.trace(beta).init, update)


def _orthogonal(x: Float[Array, "... I O"], num_iterations: int) -> Float[Array, "... I O"]:
    """U Vᵀ of the singular value decomposition, roughly: singular values end in about [0.7, 1.2].

    Newton–Schulz iteration X ← a X + b A X + c A² X with A = X Xᵀ, from the coefficients of K. Jordan (2024).
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(num_iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def muon_or_adam(params: Any) -> Any:
    """Labels matrices ``muon``, all else ``adam``: embeddings and heads too, whose rows are words, labels."""

    def label(path: tuple[Any, ...], param: Array) -> str:
        name = path_of(path)
        is_word_table = any(word in name.lower() for word in ("embed", "head", "score/"))
        return "muon" if is_matrix(name, param.shape) and not is_word_table else "adam"

    return jax.tree_util.tree_map_with_path(label, params)
