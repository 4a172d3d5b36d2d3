"""Causal self-attention within segments: what it computes, and which implementation computes it.

Scores are ``scale · q·k``; a token sees itself and the earlier tokens of its own segment. So no row is ever
empty, not even one of padding only: padding is segment 0 and sees padding. ``H = K · G`` query heads share
K key/value heads: head ``h`` reads key head ``h // G`` (Ainslie et al. 2023). An `AttentionRule` says what
else a model's family does to the scores.

Whole sequences have several implementations: "blocked" on CPUs, "splash" on TPUs, "cudnn" on GPUs of compute
capability 9.0 for calls without segment ids, and "einsum" for what these cannot do. Training always has them
(rows are packed or padded), so on a GPU it computes with einsum unless "cudnn" is asked for. All compute the
same numbers up to rounding; the choice and its reason are logged. Decoding over a cache is `cached_attention`
everywhere.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import suggest
from hybrid_jax.models.attention import blocked, cudnn, splash
from hybrid_jax.models.attention.blocked import blocked_attention
from hybrid_jax.models.attention.cudnn import cudnn_attention
from hybrid_jax.models.attention.einsum import plain_attention
from hybrid_jax.models.attention.rule import PLAIN, AttentionCall, AttentionRule
from hybrid_jax.models.attention.splash import splash_attention
from hybrid_jax.parallel.rules import current_placement, target_platform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One way to compute `causal_attention`.

    Attributes:
        attend: q, k, v, segment_ids, rule, sinks -> what the queries read.
        reason: why it cannot serve a call, or None.
        drawback: why it is not chosen for a call that it can serve, or None.
        is_kernel: whether it is one device's program, which XLA cannot split over a mesh.
    """

    attend: Callable[..., Array]
    reason: Callable[[AttentionCall], str | None] = lambda call: None
    drawback: Callable[[AttentionCall], str | None] = lambda call: None
    is_kernel: bool = False


IMPLEMENTATIONS = {
    "einsum": Implementation(plain_attention),
    "blocked": Implementation(
        lambda q, k, v, ids, rule, sinks: blocked_attention(q, k, v, ids, rule), blocked.reason
    ),
    "cudnn": Implementation(cudnn_attention, cudnn.reason, cudnn.drawback, is_kernel=True),
    "splash": Implementation(splash_attention, splash.reason, splash.drawback, is_kernel=True),
}
_PREFERRED = {"cpu": "blocked", "gpu": "cudnn", "tpu": "splash"}  # by platform


def causal_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    rule: AttentionRule = PLAIN,
    sinks: Float[Array, "H"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H C"]:
    """Attention over itself and the earlier tokens of its segment; ``None`` is one segment a row.

    ``sinks`` are scores that take part in the softmax and have no value (gpt-oss). ``implementation`` is a
    name of `IMPLEMENTATIONS`; None takes the fastest that the device and the call allow.

    Raises:
        UserError: the implementation asked for is unknown or cannot serve the call.
    """
    call = _describe(q, k, segment_ids, rule, sinks)
    name, why = choose(call, implementation)
    by_default = call.platform == "cpu" and implementation is None  # nothing that a user would want to know
    _log_once(logging.DEBUG if by_default else logging.INFO, name, why)
    chosen = IMPLEMENTATIONS[name]
    attend = on_each_device(chosen.attend) if chosen.is_kernel else chosen.attend
    return attend(q, k, v, segment_ids, rule, sinks)


def choose(call: AttentionCall, asked: str | None = None) -> tuple[str, str | None]:
    """The implementation for a call, and why it is not the one that its platform prefers."""
    if asked is not None:
        if asked not in IMPLEMENTATIONS:
            raise UserError(f"unknown attention implementation {asked!r}; {suggest(asked, IMPLEMENTATIONS)}")
        why = IMPLEMENTATIONS[asked].reason(call)
        if why is not None:
            raise UserError(
                f"attention {asked!r} cannot serve this model here: {why}; null lets the program choose"
            )
        return asked, None
    name = _PREFERRED.get(call.platform, "einsum")
    why = IMPLEMENTATIONS[name].reason(call) or IMPLEMENTATIONS[name].drawback(call)
    return (name, None) if why is None else ("einsum", why)


def on_each_device(attend: Callable[..., Array]) -> Callable[..., Array]:
    """``attend`` on every device's own rows and heads, where the placement in force has several devices."""
    placement = current_placement()
    if placement is None or placement.mesh.size == 1:
        return attend

    def attend_shards(q, k, v, segment_ids, rule, sinks):
        queries, keys = _head_specs(q, k)
        spec = functools.partial(placement.rules.spec, placement.mesh)
        rows, heads = spec(q.shape[:1], ("attention_batch",)), spec(q.shape[2:3], ("attention_heads",))
        return jax.shard_map(
            lambda q, k, v, ids, sinks: attend(q, k, v, ids, rule, sinks),
            mesh=placement.mesh,
            in_specs=(queries, keys, keys, rows, heads),
            out_specs=queries,
            check_vma=False,  # a kernel does not say over which axes its outputs vary
        )(q, k, v, segment_ids, sinks)

    return attend_shards


def _head_specs(q: Array, k: Array) -> tuple[PartitionSpec, PartitionSpec]:
    """Where queries and keys lie under the placement in force: rows and heads split, whole sequences."""
    placement = current_placement()
    if placement is None:
        return PartitionSpec(), PartitionSpec()
    spec = functools.partial(placement.rules.spec, placement.mesh)
    queries = spec(q.shape, ("attention_batch", "length", "attention_heads", None))
    return queries, spec(k.shape, ("attention_batch", "length", "attention_kv_heads", None))


def _describe(q, k, segment_ids, rule, sinks) -> AttentionCall:
    platform = target_platform()
    queries, keys = _head_specs(q, k)
    return AttentionCall(
        platform=platform,
        dtype=q.dtype.name,
        length=q.shape[1],
        channels=q.shape[3],
        rule=rule,
        segments=segment_ids is not None,
        sinks=sinks is not None,
        heads_split_alike=queries == keys,
        capability=_capability() if platform == "gpu" else None,
    )


def _capability() -> tuple[int, int] | None:
    """The compute capability of the NVIDIA GPUs that the function being traced will run on."""
    placement = current_placement()
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


@functools.cache
def _log_once(level: int, name: str, why: str | None) -> None:
    log.log(level, "attention: %s%s", name, "" if why is None else f", since {why}")
