"""Log-probabilities and entropies of next-token distributions, from logits.

Both functions keep only the logits and two numbers a position for the backward pass, and write the gradient
of the logits in one pass over the vocabulary: at 50,000 words nothing else of that size is ever stored.
They differentiate in reverse mode only. Log-probs are taken from the largest logit, not from 0, so that
their rounding error does not grow with the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybrid_jax.parallel.rules import Placement, current_placement, under

MOST_LOGIT_BYTES = 2**28  # of the float32 logits that one device holds at a time

LogitsOf = Callable[[Float[Array, "B X D"]], Float[Array, "B X V"]]


def token_log_probs(logits: Float[Array, "*shape V"], targets: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """log π(target) = logit[target] − logsumexp(logits), in float32.

    The logits must be those of the distribution in question (divide by the temperature before). A target
    outside [0, V) is read as the nearest word, so that padding of any value is harmless once masked. A
    position whose cotangent is 0 gets a zero gradient even where its logits are not finite.

    Args:
        logits: Unnormalised scores; −inf excludes a word.
        targets: Word numbers in [0, V).
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return _token_log_probs(logits, jnp.clip(targets, 0, logits.shape[-1] - 1))


def entropy(logits: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """H(π) = −Σ π log π in nats, in [0, log V], in float32; excluded words (logit −inf) contribute 0."""
    return _entropy(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def state_log_probs(
    logits_of: LogitsOf,
    states: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vocab_size: int,
    *,
    with_entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """`token_log_probs` and, if wanted, `entropy` of the logits of hidden states.

    Where the logits of all states would take more than `MOST_LOGIT_BYTES` a device, they are made and given up
    again a stretch of tokens at a time, and made once more for the gradient.

    Args:
        logits_of: the model's head, temperature included; float32 logits.
        states: what predicts each target.
        targets: the word of each state.
        vocab_size: V.
        with_entropy: whether the second result is wanted; else it is None.
    """

    def read(states, targets, logits_of):
        logits = logits_of(states)
        return token_log_probs(logits, targets), entropy(logits) if with_entropy else None

    stretch = _stretch(targets.shape[0], targets.shape[1], vocab_size)
    if stretch is None:
        return read(states, targets, logits_of)
    return _in_stretches(read, logits_of, states, targets, stretch)


def _in_stretches(read: Callable, logits_of: LogitsOf, states: Array, targets: Array, stretch: int):
    """``read`` of a stretch of tokens of every row after the other."""
    length = targets.shape[1]

    def scan(states, targets, logits_of):
        part = jax.checkpoint(lambda states, targets: read(states, targets, logits_of), prevent_cse=False)
        inputs = (_stretches(states, stretch), _stretches(targets, stretch))
        outputs = lax.scan(lambda _, inputs: (None, part(*inputs)), None, inputs)[1]
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(len(targets), -1)[:, :length], outputs)

    placement = current_placement()
    if placement is None or placement.num_row_shards == 1 or len(targets) % placement.num_row_shards:
        return scan(states, targets, logits_of)
    own = jax.ShapeDtypeStruct(
        (len(targets) // placement.num_row_shards, stretch, states.shape[2]), states.dtype
    )
    placement = replace(placement, local=True)
    head_of, head = under(placement, jax.closure_convert)(logits_of, own)
    return _on_own_rows(placement, scan, head_of, head, states, targets)


def _on_own_rows(
    placement: Placement, scan: Callable, head_of: Callable, head: list, states: Array, targets: Array
):
    """``scan`` on each device's rows: it gathers the head once, and adds up its own gradient of the head.

    Left to the compiler, both would travel once a stretch.
    """
    axes = placement.rules.batch
    gathered, parts = "fsdp", placement.mesh.shape["fsdp"]
    splits = [next((i for i, size in enumerate(leaf.shape) if size % parts == 0), None) for leaf in head]

    def local(states, targets, *head):
        whole = [
            leaf if split is None else lax.all_gather(leaf, gathered, axis=split, tiled=True)
            for leaf, split in zip(head, splits, strict=True)
        ]
        return scan(states, targets, lambda states: head_of(states, *whole))

    rows = PartitionSpec(axes)
    kept = [PartitionSpec() if i is None else PartitionSpec(*[None] * i, gathered) for i in splits]
    return jax.shard_map(
        under(placement, local),
        mesh=placement.mesh,
        in_specs=(rows, rows, *kept),
        out_specs=rows,
        axis_names=set(axes),  # how the vocabulary is split is still the compiler's
        check_vma=False,
    )(states, targets, *head)


def _stretch(rows: int, length: int, vocab_size: int) -> int | None:
    """How many tokens of every row to read at a time; None reads all."""
    placement = current_placement()
    shards = 1 if placement is None else placement.num_row_shards
    bytes_a_token = 4 * max(rows // shards, 1) * vocab_size
    if bytes_a_token * length <= MOST_LOGIT_BYTES:
        return None
    return max(MOST_LOGIT_BYTES // (2 * bytes_a_token), 1)  # half, since their gradient takes as much


def _stretches(x: Array, stretch: int) -> Array:
    """[B T ...] as [n B stretch ...], zeros behind the end."""
    missing = -x.shape[1] % stretch
    x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(len(x), -1, stretch, *x.shape[2:]).swapaxes(0, 1)


@jax.custom_vjp
def _token_log_probs(logits, targets):
    return _token_log_probs_forward(logits, targets)[0]


def _token_log_probs_forward(logits, targets):
    peak, log_sum = _normaliser(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (chosen - peak - log_sum)[..., 0], (logits, peak, log_sum, targets)


def _token_log_probs_backward(residuals, cotangent):
    logits, peak, log_sum, targets = residuals
    chosen = targets[..., None] == jnp.arange(logits.shape[-1])
    return _scaled(cotangent, chosen - jnp.exp(logits - peak - log_sum)), None


_token_log_probs.defvjp(_token_log_probs_forward, _token_log_probs_backward)


@jax.custom_vjp
def _entropy(logits):
    return _entropy_forward(logits)[0]


def _entropy_forward(logits):
    peak, log_sum = _normaliser(logits)
    value = -jnp.sum(_probability_times(logits - peak - log_sum, 0.0), axis=-1)
    return value, (logits, peak, log_sum, value)


def _entropy_backward(residuals, cotangent):
    logits, peak, log_sum, value = residuals
    return (_scaled(cotangent, -_probability_times(logits - peak - log_sum, value[..., None])),)


_entropy.defvjp(_entropy_forward, _entropy_backward)


def _normaliser(logits):
    """logsumexp in two parts, the largest logit and the rest: both [..., 1]."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    return peak, jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True))


def _probability_times(log_probs, shift):
    """π (log π + shift), with 0 · log 0 = 0."""
    return jnp.exp(log_probs) * (jnp.where(jnp.isneginf(log_probs), 0.0, log_probs) + shift)


def _scaled(cotangent, gradient):
    """Chain rule for a per-position value; 0 wins over NaN, so masked positions stay out of the gradient."""
    cotangent = cotangent[..., None]
    return jnp.where(cotangent == 0, 0.0, cotangent * gradient)
