"""The vocabulary of a pretrained model beside that of a tokenizer: more rows, or what to say without them.

A model may have more rows than its tokenizer has tokens (families pad them to round numbers): nothing follows.
The other way round an id beyond the last row can be neither read nor predicted.
"""

from __future__ import annotations

import logging

import jax.numpy as jnp
from jaxtyping import Array

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import made_in_parts

log = logging.getLogger(__name__)

RESIZE = "model.resize_vocabulary: true gives them rows"
_TOLERANCE = 1.001  # a published tokenizer may have a few tokens that its model never reads (Gemma 3: an image)
_AXES = {("token_embedding", "embedding"): 0, ("lm_head", "kernel"): 1, ("lm_head", "bias"): 0}


def embedding_rows(own: int | None, of_tokenizer: int | None) -> int:
    """The rows of a model's embedding: those its settings name, else the tokens of its tokenizer.

    Raises:
        UserError: neither is known, or a token of the tokenizer has no row.
    """
    if own is None and of_tokenizer is None:
        raise UserError("vocab_size is missing: the model names none and there is no tokenizer")
    if own is not None and of_tokenizer is not None and own < of_tokenizer:
        raise UserError(f"vocab_size must be at least the tokenizer's {of_tokenizer}, got {own}")
    return own or of_tokenizer or 0


def own_tokenizer_of(folder: object) -> str:
    """The advice where the tokenizer in a finished model's folder is larger than the model."""
    return (
        f"{str(folder)!r} needs the tokenizer that belongs to its model, or a model trained with these tokens"
    )


def vocabulary_of(model: int, tokenizer: int | None, path: str, *, resize: bool) -> int:
    """The rows that a pretrained model shall have.

    Args:
        model: rows that it has.
        tokenizer: tokens, if there is one; fewer than rows change nothing.
        path: of the model, for messages.
        resize: whether it may get more rows.

    Raises:
        UserError: the tokenizer is larger by more than a few tokens and ``resize`` is off. Of a few, only a
            text that holds one is refused (`hybrid_jax.data.bounded_tokenizer`).
    """
    if tokenizer is None or tokenizer <= model:
        return model
    if resize:
        return tokenizer
    message = f"the tokenizer has {tokenizer} tokens, more than the {model} of {path!r}"
    if tokenizer > _TOLERANCE * model:
        raise UserError(f"{message}: {RESIZE}, or take the tokenizer that belongs to the model")
    log.warning("%s: a text that holds one of the last %d is refused; %s", message, tokenizer - model, RESIZE)
    return model


def grown(params: Params, size: int) -> Params:
    """Parameters whose embedding and head have ``size`` rows, the new ones each the mean of the old ones.

    So do the biases of the head. `transformers` draws new rows around that mean, from the covariance of the old
    ones times 1e-9: the mean is the same up to that, and needs no key. Parameters that have the size already
    are returned as they are.
    """
    leaves = {place: leaf for place in _AXES if (leaf := params.get(place[0], {}).get(place[1])) is not None}
    if leaves["token_embedding", "embedding"].shape[0] == size:
        return params
    module_leaves: dict[str, dict[str, Array]] = {}
    for (module, name), leaf in leaves.items():
        module_leaves.setdefault(module, {})[name] = leaf

    def grow(tree: dict[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
        return {
            module: {name: _with_mean(leaf, size, _AXES[module, name]) for name, leaf in part.items()}
            for module, part in tree.items()
        }

    changed = made_in_parts(param_axes, grow, module_leaves)
    return {**params, **{module: {**params[module], **part} for module, part in changed.items()}}


def _with_mean(leaf: Array, size: int, axis: int) -> Array:
    mean = jnp.mean(leaf.astype(jnp.float32), axis, keepdims=True).astype(leaf.dtype)
    return jnp.concatenate([leaf, jnp.repeat(mean, size - leaf.shape[axis], axis)], axis)
