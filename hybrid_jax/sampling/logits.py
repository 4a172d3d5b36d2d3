"""From scores to a token: temperature, top-k, top-p, and drawing from what is left.

The order is temperature, then top-k, then top-p (Holtzman et al. 2020; the same as Hugging Face's). All of
it works on float32 logits [... V]; a token that is cut off gets -inf. Equal logits are ranked by their
index.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_BLOCK = 128  # tokens a block of the two-level draw; the second level reads only one block a row


def scale_by_temperature(logits: Float[Array, "... V"], temperature: float) -> Float[Array, "... V"]:
    """``logits / temperature``, float32. PPO scores its updates with the same scaling as the sampler used."""
    return logits.astype(jnp.float32) / temperature


def keep_top_k(logits: Float[Array, "... V"], top_k: int) -> Float[Array, "... V"]:
    """Keeps exactly the ``top_k`` largest."""
    return jnp.where(_ranks(logits) < top_k, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Keeps the fewest most likely tokens whose probability reaches ``top_p``: the crossing token stays."""
    ranks = _ranks(logits)
    descending = -jnp.sort(-logits, axis=-1)
    return jnp.where(jnp.take_along_axis(_inside(descending, top_p), ranks, -1), logits, -jnp.inf)


def sampling_logits(
    logits: Float[Array, "... V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Array, "... V"]:
    """Logits of the distribution that `sample_token` draws from, ``temperature > 0``."""
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    return logits if top_p is None else keep_top_p(logits, top_p)


def sample_token(
    logits: Float[Array, "B V"],
    key: Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws a token a row; returns it and its log-probability under the distribution drawn from.

    ``temperature=0`` takes the most likely token, with log-probability 0: that distribution has one token.
    """
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.zeros(logits.shape[0])
    logits = scale_by_temperature(logits, temperature)
    if top_k is None and top_p is None:
        return draw(logits, key)
    # Sorted candidates instead of a masked vocabulary: everything after the sort works on k numbers.
    candidates, tokens = lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        candidates = jnp.where(_inside(candidates, top_p), candidates, -jnp.inf)
    choice, log_prob = draw(candidates, key)
    return jnp.take_along_axis(tokens, choice[:, None], 1)[:, 0], log_prob


def draw(logits: Float[Array, "B V"], key: Array) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws a token a row from ``softmax(logits)`` by inverting its cumulative distribution in two levels.

    First a block of 128 tokens is drawn, then a token of that block, each with its own uniform number: two
    random numbers a row instead of V of them (a Gumbel draw), and no long float32 cumulative sum. Also
    returns the log-probability.
    """
    batch, vocab = logits.shape
    blocks = math.ceil(vocab / _BLOCK)
    top = jnp.max(logits, -1, keepdims=True)
    weights = jnp.exp(logits - top)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - vocab))).reshape(batch, blocks, _BLOCK)
    totals = jnp.sum(padded, -1)
    uniform = jax.random.uniform(key, (2, batch))
    block = _invert(totals, uniform[0])
    inside = jnp.take_along_axis(padded, block[:, None, None], 1)[:, 0]
    token = block * _BLOCK + _invert(inside, uniform[1])
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return token, chosen - top[:, 0] - jnp.log(jnp.sum(totals, -1))


def _invert(weights: Float[Array, "B X"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index whose cumulative weight exceeds ``uniform · total``: never one of weight 0."""
    cumulative = jnp.cumsum(weights, -1)
    total = cumulative[:, -1]
    target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative <= target[:, None], -1, dtype=jnp.int32)


def _ranks(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
    """0 for the largest; the inverse of the sorting permutation."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)


def _inside(descending: Float[Array, "... V"], top_p: float) -> Array:
    """Whether what comes before a token is still less than ``top_p``; always true of the first."""
    cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    return jnp.pad(
        cumulative[..., :-1] < top_p, [(0, 0)] * (descending.ndim - 1) + [(1, 0)], constant_values=True
    )
