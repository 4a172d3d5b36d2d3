"""The best that a device can do, and the bytes that decoding has to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.flops import matmul_parameters
from hybrid_jax.planning.accelerators import local_accelerator


@dataclass(frozen=True)
class Peaks:
    """The best that one device can do in a second; None where nobody knows."""

    flops: float | None
    bandwidth: float | None  # bytes
    source: str  # "published", "given", "measured" or "unknown"

    def share_of_flops(self, flops: float, seconds: float) -> float | None:
        return None if self.flops is None else flops / seconds / self.flops

    def share_of_bandwidth(self, count: float, seconds: float) -> float | None:
        return None if self.bandwidth is None else count / seconds / self.bandwidth


def find_peaks(given: Sequence[float] | None = None) -> Peaks:
    """The limits of the first device; ``given`` are 10¹² FLOPs and 10⁹ bytes a second."""
    if given is not None:
        return Peaks(given[0] * 1e12, given[1] * 1e9, "given")
    chip = local_accelerator(jax.devices()[:1])
    if chip is None:
        return Peaks(None, None, "unknown")
    return Peaks(chip.peak_flops / chip.devices, chip.memory_bandwidth / chip.devices, chip.source)


def needed_bytes(config: DecoderConfig, rows: int, prompt: int, new_tokens: int) -> float:
    """The bytes that decoding must read: in each turn all weights, and the keys and values so far."""
    turns = new_tokens - 1
    contexts = turns * prompt + turns * (turns + 1) // 2
    return turns * _weight_bytes(config) + rows * contexts * _token_bytes(config)


def slot_bytes(config: DecoderConfig, rows: int, prompt: int, lengths: Sequence[int]) -> float:
    """The bytes that they read with every slot of the cache, which grows through ``lengths``."""
    starts = (prompt, *lengths)  # tokens read before the first turn with so many slots
    turns_and_slots = [(after - before, after) for before, after in zip(starts, lengths, strict=False)]
    slots = sum(turns * length for turns, length in turns_and_slots)
    return (lengths[-1] - prompt) * _weight_bytes(config) + rows * slots * _token_bytes(config)


def _weight_bytes(config: DecoderConfig) -> int:
    return matmul_parameters(config) * jnp.dtype(config.dtype).itemsize


def _token_bytes(config: DecoderConfig) -> int:
    """The bytes of the keys and values of one token."""
    return 2 * config.num_layers * config.kv_heads * config.channels * jnp.dtype(config.dtype).itemsize
