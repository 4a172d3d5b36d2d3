"""Gated DeltaNet: a state corrected towards each value, read in chunks (Yang et al. 2024, arXiv 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hybrid_jax.core.ranges import Width, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import linear, rms_norm
from hybrid_jax.models.recurrent.chunks import (
    ChunkedCell,
    ChunkedSettings,
    Stretch,
    convolved,
    convolved_one,
    decays,
    in_chunks,
    init_convolution,
    init_decay,
    log_decay,
)

_EPSILON = 1e-6  # added to the squared length of queries and keys
_STEPS = (0.001, 0.1)  # the range of time steps at the start
State = tuple[Float[Array, "B K C"], Float[Array, "B H N P"]]


@BACKBONES.register("gated_deltanet")
@settings
class GatedDeltaNet(ChunkedSettings):
    """Settings of a gated DeltaNet language model; see `GatedDeltaNetCell`."""

    key_heads: Width = 4  # of queries and keys
    value_heads: Width | None = None  # H, each with a state, a multiple of key_heads; null: key_heads
    key_width: Width = 64  # N, of a query and a key
    value_width: Width = 64  # P, of a value

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.key_heads:
            raise ValueError(f"value_heads must be a multiple of key_heads {self.key_heads}, got {self.heads}")

    @property
    def heads(self) -> int:
        """H."""
        return self.key_heads if self.value_heads is None else self.value_heads

    def cell(self) -> GatedDeltaNetCell:
        """One layer."""
        return GatedDeltaNetCell(self)


@dataclass(frozen=True)
class GatedDeltaNetCell(ChunkedCell):
    """The mixer, for each of H heads, whose keys several may share:

        q, k, v, z, b, δ = W u                       kernel [D O], in this order
        q, k, v = silu(convolution(q, k, v))         of each channel by itself, over the last few tokens
        q = q / (|q| √N),   k = k / |k|
        β = σ(b),   a = exp(−exp(A) softplus(δ + d))
        S ← a S + k (β (v − a Sᵀ k))ᵀ                [N P], zero at the start
        y = P (norm(Sᵀ q) silu(z))                   an RMS norm for each head, one scale for all

    That is equation 10 of the paper. The state is the last tokens before the convolution, and S.
    """

    settings: GatedDeltaNet

    @property
    def _keys(self) -> int:
        return self.settings.key_heads * self.settings.key_width

    @property
    def _values(self) -> int:
        return self.settings.heads * self.settings.value_width

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: decays as those of `Mamba2Cell`."""
        c, channels = self.settings, 2 * self._keys + self._values
        keys = jax.random.split(key, 4)
        normal = jax.nn.initializers.lecun_normal()
        return {
            "input": {"kernel": normal(keys[0], (inputs, channels + self._values + 2 * c.heads))},
            "convolution": init_convolution(keys[1], c.convolution_width, channels, bias=False),
            **init_decay(keys[2], c.heads, *_STEPS),
            "norm": {"scale": jnp.ones(c.value_width)},
            "projection": {"kernel": normal(keys[3], (self._values, self.width))},
        }

    def start(self, rows: int) -> State:
        """`Cell.start`."""
        c = self.settings
        window = jnp.zeros((rows, c.convolution_width - 1, 2 * self._keys + self._values))
        return window, jnp.zeros((rows, c.heads, c.key_width, c.value_width))

    def flops(self) -> int:
        """`Cell.flops`: the convolution, and reading, writing and reading a state."""
        c = self.settings
        return 2 * c.convolution_width * (2 * self._keys + self._values) + 6 * self._values * c.key_width

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """`Cell.prepared`: W u."""
        return linear(x, params["input"]["kernel"])

    def step(self, params: Params, state: State, inputs: Float[Array, "B O"]):
        """`Cell.step`."""
        window, s = state
        channels, z, b, delta = self._parts(inputs)
        channels, window = convolved_one(params["convolution"], channels, window)
        q, k, v = self._heads_of(channels)
        s = jnp.exp(log_decay(params, delta))[..., None, None] * s
        error = v - jnp.einsum("bhnp,bhn->bhp", s, k)
        s += k[..., None] * (jax.nn.sigmoid(b)[..., None] * error)[:, :, None]
        return (window, s), self._output(params, jnp.einsum("bhnp,bhn->bhp", s, q), z)

    def read_together(self, params: Params, inputs: Float[Array, "T B O"], state: State, stretch: Stretch):
        """`ChunkedCell.read_together`."""
        window, s = state
        channels, z, b, delta = self._parts(inputs)
        channels, window = convolved(params["convolution"], channels, window, stretch)
        real, rate = stretch.real[..., None], jax.nn.sigmoid(b)
        rate, decay = (jnp.where(real, each, 0) for each in (rate, log_decay(params, delta)))
        y, s = delta_rule(
            *self._heads_of(channels), rate, decay, s, stretch.segment, self.settings.chunk_length
        )
        return self._output(params, y, z), (window, s)

    def _parts(self, inputs: Array) -> list[Array]:
        """Splits the product of the input: channels to convolve, z, b and δ."""
        ends = [2 * self._keys + self._values, 2 * (self._keys + self._values)]
        return jnp.split(inputs, [*ends, ends[1] + self.settings.heads], axis=-1)

    def _heads_of(self, channels: Array) -> tuple[Array, Array, Array]:
        """q and k [… H N] of their length, and v [… H P]."""
        c, lead = self.settings, channels.shape[:-1]
        q, k, v = jnp.split(channels, [self._keys, 2 * self._keys], axis=-1)
        q, k = (_unit(each.reshape(*lead, c.key_heads, c.key_width)) for each in (q, k))
        q, k = (jnp.repeat(each, c.heads // c.key_heads, axis=-2) for each in (q, k))
        return q * c.key_width**-0.5, k, v.reshape(*lead, c.heads, c.value_width)

    def _output(self, params: Params, y: Array, z: Array) -> Array:
        y = rms_norm(y, params["norm"]["scale"], self.settings.epsilon).reshape(z.shape)
        return linear(y * jax.nn.silu(z), params["projection"]["kernel"])


def _unit(x: Array) -> Array:
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _EPSILON)


def delta_rule(
    q: Float[Array, "T B H N"],
    k: Float[Array, "T B H N"],
    v: Float[Array, "T B H P"],
    rate: Float[Array, "T B H"],
    log_decay: Float[Array, "T B H"],
    state: Float[Array, "B H N P"],
    segment: Int[Array, "T B"],
    length: int,
) -> tuple[Float[Array, "T B H P"], Float[Array, "B H N P"]]:
    """Reads rows of S ← a S + k eᵀ, e = rate (v − a Sᵀ k), y = Sᵀ q, chunk by chunk (section 3.3 of the paper).

    In a chunk that begins with S₀ the corrections solve (I + A) e = rate (v − d S₀ᵀ k). A is strictly lower, at
    [t s] rate (k_t · k_s) decayed from s to t; d is the decay from the start.

    Args:
        q: what is read.
        k: where it is written, of length 1.
        v: what is written.
        rate: of the correction, in [0, 1].
        log_decay: log a, at most 0.
        state: before the first token.
        segment: a state of another segment is not seen; 0 goes on from ``state``.
        length: of a chunk; the result is the same for any.

    Returns:
        y, and the state behind the last token.
    """
    steps, length = len(q), min(length, len(q))
    by_head = lambda each: jnp.moveaxis(in_chunks(length, each), 1, 3)  # noqa: E731  [n B H t …]
    qs, ks, vs, rates = map(by_head, (q, k, v, rate[..., None]))
    d = decays(in_chunks(length, log_decay), in_chunks(length, segment, "edge"))
    from_start, to_end = (jnp.moveaxis(each, 1, 3)[..., None] for each in (d.from_start, d.to_end))

    below = jnp.tril(jnp.ones((length, length), bool), -1)
    a = jnp.where(below, rates * d.between * jnp.einsum("nbhtk,nbhsk->nbhts", ks, ks), 0)
    right = jnp.concatenate([rates * vs, rates * from_start * ks], axis=-1)
    solved = inverse_of_unit_lower(a) @ right
    written, seen = jnp.split(solved, [v.shape[-1]], axis=-1)

    def one(s: Array, now: tuple[Array, ...]):
        written, seen, keys, across = now
        e = written - seen @ s
        return across[..., None, None] * s + keys.swapaxes(-1, -2) @ e, (e, s)

    last, (e, before) = lax.scan(one, state, (written, seen, to_end * ks, d.across))
    scores = d.between * jnp.einsum("nbhtk,nbhsk->nbhts", qs, ks)
    y = jnp.moveaxis(scores @ e + from_start * (qs @ before), 3, 1)
    return y.reshape(-1, *y.shape[2:])[:steps], last


def inverse_of_unit_lower(a: Float[Array, "*B t t"]) -> Float[Array, "*B t t"]:
    """(I + A)⁻¹ of a strictly lower A, by halves: of [[X, 0], [C, Y]] it is [[X⁻¹, 0], [−Y⁻¹ C X⁻¹, Y⁻¹]].

    It is as accurate as forward substitution, and made of log₂ t products, where a triangular solve is a loop.
    """
    length = a.shape[-1]
    if length <= 2:
        return jnp.eye(length) - a
    half = 1 << (length - 1).bit_length() - 1
    missing = 2 * half - length
    a = jnp.pad(a, (*((0, 0),) * (a.ndim - 2), (0, missing), (0, missing)))
    first, second = inverse_of_unit_lower(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    below = -second @ a[..., half:, :half] @ first
    top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    whole = jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
    return whole[..., :length, :length]
