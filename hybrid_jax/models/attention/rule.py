"""Rules for the scores of attention, by family, and the facts of a call that an implementation decides by."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionRule:
    """How scores become weights, beside causality: ``softmax(mask(cap · tanh(scale · q·k / cap) + bias))``.

    Attributes:
        scale: of the scores; None is 1/√C.
        window: a token sees itself and the ``window - 1`` tokens before it.
        softcap: bound of the scores, smoothly (Gemma 2).
        slopes: of ALiBi, one a head: ``-slope · distance`` is added (Press et al. 2022).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None

    def score_scale(self, channels: int) -> float:
        """The factor on products of queries and keys: 1 / √channels unless one is set."""
        return channels**-0.5 if self.scale is None else self.scale


PLAIN = AttentionRule()


def alibi_slopes(heads: int, largest_exponent: float = 8.0) -> tuple[float, ...]:
    """``2^(-e h / n)`` for h = 1 … n, n the power of 2 at least ``heads``, e the largest exponent.

    Where ``heads`` is less than n: every second slope first, then those between (Press et al. 2022).
    """
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-largest_exponent * h / n) for h in range(1, n + 1)]
    return tuple(slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads])


@dataclass(frozen=True)
class AttentionCall:
    """One call of `causal_attention`, as far as it decides which implementation serves it.

    Attributes:
        platform: of the devices that will run it: "cpu", "gpu" or "tpu".
        dtype: of queries, keys and values, by name.
        length: T.
        channels: C, of one head.
        rule: what is done to the scores.
        segments: whether there are segment ids.
        sinks: whether there are sinks.
        heads_split_alike: whether the mesh gives every device the K/V heads that its query heads read.
        capability: of an NVIDIA GPU, (9, 0) for Hopper; None for any other device.
    """

    platform: str
    dtype: str
    length: int
    channels: int
    rule: AttentionRule = PLAIN
    segments: bool = False
    sinks: bool = False
    heads_split_alike: bool = True
    capability: tuple[int, int] | None = None
