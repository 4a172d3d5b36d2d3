"""Rotary positions (Su et al. 2021) and the ways to stretch them over longer contexts.

Channel pair ``i`` of ``C`` rotary channels turns by ``position · θ^(-2i/C)``. A scaling changes these
frequencies and may also amplify queries and keys by one factor. Frequencies are computed once, in float64,
while the program is traced; only `Dynamic` and `LongRope` depend on the length of a sequence: the number of
its tokens so far, without padding and without the sequences packed beside it. Beyond their original length
the frequencies therefore change as a sequence grows, so that a cached decode no longer equals one pass over
the whole, in `transformers` as here; a rollout refuses to go there (`RopeScaling.steady_length`).
"""

from __future__ import annotations

import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybrid_jax.core.ranges import Count, Positive, settings
from hybrid_jax.core.registry import Registry

Frequencies = np.ndarray  # float64 [C/2]


class RopeScaling(Protocol):
    """Settings that change the frequencies of rotary positions, an entry of `ROPE_SCALINGS`."""

    def frequencies(
        self, plain: Frequencies, theta: float, lengths: Int[Array, "B T 1"]
    ) -> Float[Array, "B T C/2"] | Frequencies:
        """Frequencies by which channel pairs turn, for tokens of sequences of these lengths."""
        ...

    @property
    def steady_length(self) -> int | None:
        """Tokens up to which the frequencies stay as they are while a sequence grows; None is for ever."""
        ...

    @property
    def amplification(self) -> float:
        """Factor on the rotated queries and on the rotated keys."""
        ...


ROPE_SCALINGS: Registry[RopeScaling] = Registry("rope scaling")


@ROPE_SCALINGS.register("linear")
@settings
class Linear:
    """Positions divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: Positive  # how many times longer than in training rows may be
    amplification = 1.0
    steady_length = None

    def frequencies(self, plain, theta, lengths):
        """All frequencies divided by the factor."""
        return plain / self.factor


@ROPE_SCALINGS.register("dynamic")
@settings
class Dynamic:
    """NTK-aware: rows longer than ``original_length`` get a larger base, θ·(f·n/n₀ − f + 1)^(C/(C−2))."""

    factor: Positive  # how strongly the base grows with longer rows
    original_length: Count  # tokens of the longest row in training
    amplification = 1.0

    @property
    def steady_length(self) -> int:
        """The original length."""
        return self.original_length

    def frequencies(self, plain, theta, lengths):
        """Frequencies of the base that each sequence needs."""
        channels = 2 * len(plain)
        stretch = jnp.maximum(lengths, self.original_length) / self.original_length
        base = theta * (self.factor * stretch - (self.factor - 1)) ** (channels / (channels - 2))
        return base ** (-np.arange(0, channels, 2) / channels)


@ROPE_SCALINGS.register("llama3")
@settings
class Llama3:
    """Long wavelengths are divided by ``factor``, short ones kept, those between interpolated (Llama 3.1)."""

    factor: Positive  # divisor of long wavelengths
    low_freq_factor: Positive  # turns in the original context up to which a pair is divided
    high_freq_factor: Positive  # turns from which on a pair is kept
    original_length: Count  # tokens of the longest row in training
    amplification = 1.0
    steady_length = None

    def frequencies(self, plain, theta, lengths):
        """Each frequency kept, divided or between the two, by its turns in the original context."""
        turns = self.original_length * plain / (2 * math.pi)  # in the original context
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * plain + (1 - keep) * plain / self.factor


@ROPE_SCALINGS.register("yarn")
@settings
class Yarn:
    """Pairs with few turns in the original context are interpolated (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
        beta_fast: turns above which a pair stays as it is.
        beta_slow: turns below which a pair is divided by ``factor``; between them a linear ramp over pairs.
        truncate: round the ends of the ramp outwards to whole pairs.
        attention_factor: amplification; None is the paper's ``0.1 ln(factor) + 1``.
    """

    factor: Positive  # how many times longer than in training rows may be
    original_length: Count  # tokens of the longest row in training
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    steady_length = None

    @property
    def amplification(self) -> float:
        """The attention factor, or the one of the paper."""
        return yarn_amplification(self.factor) if self.attention_factor is None else self.attention_factor

    def frequencies(self, plain, theta, lengths):
        """Each frequency kept, divided or between the two, by the ramp over pairs."""
        channels = 2 * len(plain)

        def pair_with(turns: float) -> float:
            return channels * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        ramp = (np.arange(len(plain)) - low) / (high - low if high != low else 0.001)
        interpolate = np.clip(ramp, 0.0, 1.0)
        return (1 - interpolate) * plain + interpolate * plain / self.factor


def yarn_amplification(factor: float, strength: float = 1.0) -> float:
    """``0.1 · strength · ln(factor) + 1``, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


@ROPE_SCALINGS.register("longrope")
@settings
class LongRope:
    """Every pair has its own divisor, another one for rows beyond ``original_length`` (arXiv:2402.13753)."""

    short_factor: tuple[Positive, ...]  # divisor of each pair in rows up to original_length
    long_factor: tuple[Positive, ...]  # divisor of each pair in longer rows
    original_length: Count  # tokens of the longest row in training
    amplification: Positive = 1.0  # factor on the rotated queries and keys

    @property
    def steady_length(self) -> int:
        """The original length."""
        return self.original_length

    def frequencies(self, plain, theta, lengths):
        """Frequencies divided pair by pair, by those for short or for long rows."""
        short, long = plain / np.asarray(self.short_factor), plain / np.asarray(self.long_factor)
        return jnp.where(lengths > self.original_length, long, short)


def rotary_table(
    positions: Int[Array, "B T"],
    channels: int,
    theta: float,
    scaling: RopeScaling | None = None,
    lengths: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T 1 C/2"], Float[Array, "B T 1 C/2"]]:
    """Cosine and sine by which `rotate` turns, amplified as the scaling says.

    An odd number of ``channels`` gives pairs for one channel more, as `transformers` turns it. ``lengths``
    counts the tokens of each token's sequence so far; None is a row that ends with its largest position.
    """
    frequencies: np.ndarray | Array = theta ** (-np.arange(0, channels, 2) / channels)
    if scaling is not None:
        if lengths is None:
            lengths = jnp.max(positions, axis=1, keepdims=True) + 1
        frequencies = scaling.frequencies(frequencies, theta, lengths[..., None])
    frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    amplification = 1.0 if scaling is None else scaling.amplification
    return amplification * jnp.cos(angles)[:, :, None], amplification * jnp.sin(angles)[:, :, None]


def rotate(
    x: Float[Array, "B T H C"], table: tuple[Array, Array], *, interleaved: bool = False
) -> Float[Array, "B T H C"]:
    """Turns channel pairs by the table; channels beyond it stay as they are.

    Pairs are ``(i, i + C/2)``, as most Hugging Face checkpoints have them, or ``(2i, 2i + 1)`` if
    ``interleaved``.
    """
    cos, sin = table
    channels = 2 * cos.shape[-1]
    turned, rest = x[..., :channels].astype(jnp.float32), x[..., channels:]
    if interleaved:
        left, right = turned[..., ::2], turned[..., 1::2]
    else:
        left, right = jnp.split(turned, 2, axis=-1)
    pair = (left * cos - right * sin, right * cos + left * sin)
    turned = jnp.stack(pair, -1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)
