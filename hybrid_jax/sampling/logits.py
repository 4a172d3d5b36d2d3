"""From scores to a token: temperature, top-k, top-p, min-p, typical, and drawing from what is left.

The order is that of the name, the same as Hugging Face's. All of it works on float32 logits [... V]; a token
that is cut off gets -inf. Equal logits are ranked by their index.

A CPU sorts. Accelerators sort a vocabulary slowly; they find the smallest logit that is kept by bisecting its
bits, one sum over the vocabulary for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from hybrid_jax.parallel.rules import shard, target_platform

_BLOCK = 128  # tokens a block of the two-level draw; the second level reads only one block a row


def scale_by_temperature(logits: Float[Array, "... V"], temperature: float) -> Float[Array, "... V"]:
    """``logits / temperature``, float32. PPO scores its updates with the same scaling as the sampler used."""
    return logits.astype(jnp.float32) / temperature


def keep_top_k(logits: Float[Array, "... V"], top_k: int) -> Float[Array, "... V"]:
    """Keeps exactly the ``top_k`` largest."""
    if _sorts():
        return jnp.where(_ranks(logits) < top_k, logits, -jnp.inf)
    count = min(top_k, logits.shape[-1])
    kept = _fewest_largest(logits, lambda kept: jnp.sum(kept, -1, keepdims=True) >= count)
    return jnp.where(kept, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "... V"], top_p: float) -> Float[Array, "... V"]:
    """Keeps the fewest most likely tokens whose probability reaches ``top_p``: the crossing token stays."""
    if top_p == 1:
        return logits
    if _sorts():
        ranks = _ranks(logits)
        descending = -jnp.sort(-logits, axis=-1)
        return jnp.where(jnp.take_along_axis(_inside(descending, top_p), ranks, -1), logits, -jnp.inf)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))

    def mass(kept):
        return jnp.sum(jnp.where(kept, weights, 0.0), -1, keepdims=True)

    target = top_p * mass(jnp.ones(logits.shape, bool))
    return jnp.where(_fewest_largest(logits, lambda kept: mass(kept) >= target), logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "... V"], min_p: float) -> Float[Array, "... V"]:
    """Keeps tokens whose probability is at least ``min_p`` times that of the likeliest (Nguyen et al. 2024)."""
    least = jnp.max(logits, -1, keepdims=True) + math.log(min_p)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_typical(logits: Float[Array, "... V"], typical_p: float) -> Float[Array, "... V"]:
    """Keeps the tokens whose ``-log p`` is nearest to the entropy, until their mass reaches ``typical_p``.

    Those that are as near as the last one stay, too (Meister et al. 2023).
    """
    if typical_p == 1:
        return logits
    log_probs = jax.nn.log_softmax(logits)
    weights = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(weights > 0, weights * log_probs, 0.0), -1, keepdims=True)
    nearness = -jnp.abs(log_probs + entropy)
    if _sorts():
        order = jnp.argsort(-nearness, axis=-1)
        before = jnp.cumsum(jnp.take_along_axis(weights, order, -1), -1) < typical_p
        last = jnp.minimum(jnp.sum(before, -1, keepdims=True), logits.shape[-1] - 1)
        least = jnp.take_along_axis(nearness, jnp.take_along_axis(order, last, -1), -1)
        return jnp.where(nearness >= least, logits, -jnp.inf)
    order, target = _order(nearness), typical_p * jnp.sum(weights, -1, keepdims=True)

    def enough(number):
        return jnp.sum(jnp.where(order >= number, weights, 0.0), -1, keepdims=True) >= target

    least = _largest_number(32, target.shape, enough)
    return jnp.where(order >= least, logits, -jnp.inf)


def sampling_logits(
    logits: Float[Array, "... V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> Float[Array, "... V"]:
    """Logits of the distribution that `sample_token` draws from, ``temperature > 0``."""
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return _keep_likely(logits, min_p, typical_p)


def sample_token(
    logits: Float[Array, "B V"],
    noise: Float[Array, "B 2"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws a token a row; returns it and its log-probability under the distribution drawn from.

    ``temperature=0`` takes the most likely token, with log-probability 0: that distribution has one token.

    Args:
        logits: of the model.
        noise: uniform numbers in [0, 1); they alone decide which token is drawn.
        temperature, top_k, top_p, min_p, typical_p: as in `Ancestral`.
    """
    if temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32), jnp.zeros(logits.shape[0])
    if not _sorts() or (top_k is None and top_p in (None, 1)):
        return draw(sampling_logits(logits, temperature, top_k, top_p, min_p, typical_p), noise)
    # Sorted candidates instead of a masked vocabulary: everything after the sort works on k numbers.
    logits = scale_by_temperature(logits, temperature)
    candidates, tokens = lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p not in (None, 1):
        candidates = jnp.where(_inside(candidates, top_p), candidates, -jnp.inf)
    choice, log_prob = draw(_keep_likely(candidates, min_p, typical_p), noise)
    return jnp.take_along_axis(tokens, choice[:, None], 1)[:, 0], log_prob


def draw(logits: Float[Array, "B V"], noise: Float[Array, "B 2"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
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
    block = _invert(totals, noise[:, 0])
    inside = jnp.take_along_axis(padded, block[:, None, None], 1)[:, 0]
    token = block * _BLOCK + _invert(inside, noise[:, 1])
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return token, chosen - top[:, 0] - jnp.log(jnp.sum(totals, -1))


def response_keys(key: Array, prompts: Int[Array, "B"]) -> Shaped[Array, "B"]:
    """The key of the response to each prompt: a function of ``key`` and the prompt's number alone."""
    return jax.vmap(lambda prompt: jax.random.fold_in(key, prompt))(prompts)


def response_noise(keys: Shaped[Array, "B"], num_tokens: int) -> Float[Array, "B R 2"]:
    """The uniform numbers of every response token: a function of its response's key and its position alone."""
    of_response = lambda key: jax.random.uniform(key, (num_tokens, 2))  # noqa: E731
    return shard(jax.vmap(of_response)(keys), "attention_batch", None, None)


def is_end(tokens: Int[Array, "B"], eos_ids: Sequence[int]) -> Bool[Array, "B"]:
    """Tells whether a token is one of those that end a response."""
    return jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(tokens.shape, bool)


def _keep_likely(
    logits: Float[Array, "... V"], min_p: float | None, typical_p: float | None
) -> Float[Array, "... V"]:
    """Min-p, then typical, of what is left of a vocabulary in any order."""
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return logits if typical_p is None else keep_typical(logits, typical_p)


def _invert(weights: Float[Array, "B X"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The first index whose cumulative weight exceeds ``uniform · total``: never one of weight 0."""
    cumulative = jnp.cumsum(weights, -1)
    total = cumulative[:, -1]
    target = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.sum(cumulative <= target[:, None], -1, dtype=jnp.int32)


def _sorts() -> bool:
    """Tells whether the function being traced sorts; measured faster on a CPU."""
    return target_platform() == "cpu"


def _fewest_largest(
    logits: Float[Array, "... V"], enough: Callable[[Bool[Array, "... V"]], Bool[Array, "... 1"]]
) -> Bool[Array, "... V"]:
    """Which are the fewest of the largest logits that are ``enough`` together, equal ones by their index.

    32 calls of ``enough`` find the bits of the smallest one; only if it is not alone with its value do
    ⌈log₂ V⌉ more find the last index. ``enough`` must hold of all, and of more where it holds of fewer.
    """
    order, vocab = _order(logits), logits.shape[-1]
    index = lax.broadcasted_iota(jnp.uint32, logits.shape, logits.ndim - 1)
    rows = (*logits.shape[:-1], 1)
    least = _largest_number(32, rows, lambda number: enough(order >= number))
    above, equal = order > least, order == least

    def last_index():
        bits = (vocab - 1).bit_length()
        return _largest_number(bits, rows, lambda number: ~enough(above | equal & (index < number)))

    tied = jnp.any(jnp.sum(equal, -1) > 1)
    last = lax.cond(tied, last_index, lambda: jnp.full_like(least, vocab))
    return above | equal & (index <= last)


def _largest_number(
    bits: int, shape: tuple[int, ...], holds: Callable[[Int[Array, "... 1"]], Bool[Array, "... 1"]]
) -> Int[Array, "... 1"]:
    """The largest number of so many bits that ``holds``, as it does of 0 and of every smaller one."""

    def next_bit(i, number):
        larger = number | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(larger), larger, number)

    return lax.fori_loop(0, bits, next_bit, jnp.zeros(shape, jnp.uint32))


def _order(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
    """Unsigned integers in the order of the logits, -0 like 0: the sign bit flipped, or all of a negative."""
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _ranks(logits: Float[Array, "... V"]) -> Int[Array, "... V"]:
    """0 for the largest; the inverse of the sorting permutation."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)


def _inside(descending: Float[Array, "... V"], top_p: float) -> Array:
    """Tells whether what comes before a token is still less than ``top_p``; always true of the first."""
    cumulative = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    return jnp.pad(
        cumulative[..., :-1] < top_p, [(0, 0)] * (descending.ndim - 1) + [(1, 0)], constant_values=True
    )
