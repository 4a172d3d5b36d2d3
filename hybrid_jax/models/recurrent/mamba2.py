"""Mamba-2: a state space of scalar decays, read in chunks (Dao & Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from hybrid_jax.core.ranges import Positive, Width, settings
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
    time_step,
)

State = tuple[Float[Array, "B K C"], Float[Array, "B H P N"]]


@BACKBONES.register("mamba2")
@settings
class Mamba2(ChunkedSettings):
    """Settings of a Mamba-2 language model; see `Mamba2Cell`."""

    state_width: Width = 128  # N, numbers that the state keeps of each inner channel
    expand: Width = 2  # inner channels for each of width
    head_width: Width = 64  # P, inner channels that share a decay
    groups: Width = 1  # of heads that share what writes and reads their states
    convolution_bias: bool = True  # of the short convolution
    bias: bool = False  # of the two linear maps
    min_time_step: Positive = 0.001  # the smallest at the start: the smaller, the longer a head remembers
    max_time_step: Positive = 0.1  # the largest at the start
    norm_epsilon: Positive = 1e-5  # of the norms, added to the mean square

    def __post_init__(self):
        super().__post_init__()
        inner = self.expand * self.width
        if inner % self.head_width:
            raise ValueError(
                f"head_width must divide expand x width = {inner} inner channels, got {self.head_width}"
            )
        if (heads := inner // self.head_width) % self.groups:
            raise ValueError(f"groups must divide the {heads} heads, got {self.groups}")
        if self.min_time_step > self.max_time_step:
            raise ValueError(
                f"max_time_step must be at least min_time_step {self.min_time_step}, got {self.max_time_step}"
            )

    @property
    def num_heads(self) -> int:
        """H."""
        return self.expand * self.width // self.head_width

    def resolved(self) -> Mamba2:
        """The same with every setting spelled out."""
        return replace(self, embedding_width=self.input_width)

    def cell(self) -> Mamba2Cell:
        """One layer."""
        return Mamba2Cell(self)


@dataclass(frozen=True)
class Mamba2Cell(ChunkedCell):
    """The mixer, with E = expand · D inner channels in H heads of P, and G groups of heads:

        z, x, B, C, δ = W u                          kernel [D 2E+2GN+H], in this order
        x, B, C = silu(convolution(x, B, C))         of each channel by itself, over the last few tokens
        Δ = softplus(δ + b),   a = exp(−exp(A) Δ)    one number a head
        S ← a S + Δ x Bᵀ                             [P N] a head, zero at the start
        y = P norm(silu(z) (S C + d x))              an RMS norm for each group of channels

    The state is the last tokens before the convolution, and S.
    """

    settings: Mamba2

    @property
    def _inner(self) -> int:
        return self.settings.expand * self.settings.width

    @property
    def _channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self._inner + 2 * self.settings.groups * self.settings.state_width

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: rates of decay uniform in [1, 16], time steps log-uniform, as in the authors' code."""
        c, e, h = self.settings, self._inner, self.settings.num_heads
        keys = jax.random.split(key, 4)
        normal = jax.nn.initializers.lecun_normal()
        params: Params = {
            "input": {"kernel": normal(keys[1], (inputs, e + self._channels + h))},
            "convolution": init_convolution(keys[2], c.convolution_width, self._channels, c.convolution_bias),
            **init_decay(keys[3], h, c.min_time_step, c.max_time_step),
            "skip": {"scale": jnp.ones(h)},
            "norm": {"scale": jnp.ones(e)},
            "projection": {"kernel": normal(keys[0], (e, self.width))},
        }
        if c.bias:
            for name in ("input", "projection"):
                params[name]["bias"] = jnp.zeros(params[name]["kernel"].shape[1])
        return params

    def start(self, rows: int) -> State:
        """`Cell.start`."""
        c = self.settings
        window = jnp.zeros((rows, c.convolution_width - 1, self._channels))
        return window, jnp.zeros((rows, self.settings.num_heads, c.head_width, c.state_width))

    def flops(self) -> int:
        """`Cell.flops`: the convolution, and writing and reading a state."""
        return (
            2 * self.settings.convolution_width * self._channels + 4 * self._inner * self.settings.state_width
        )

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """`Cell.prepared`: W u."""
        return linear(x, params["input"]["kernel"], params["input"].get("bias"))

    def step(self, params: Params, state: State, inputs: Float[Array, "B O"]):
        """`Cell.step`."""
        window, s = state
        z, channels, delta = self._parts(inputs)
        channels, window = convolved_one(params["convolution"], channels, window)
        x, b, c, step, decay = self._terms(params, channels, delta)
        b, c = (jnp.repeat(each, self.settings.num_heads // self.settings.groups, axis=1) for each in (b, c))
        s = jnp.exp(decay)[..., None, None] * s + (step[..., None] * x)[..., None] * b[:, :, None]
        y = jnp.einsum("bhpn,bhn->bhp", s, c)
        return (window, s), self._output(params, y, x, z)

    def read_together(self, params: Params, inputs: Float[Array, "T B O"], state: State, stretch: Stretch):
        """`ChunkedCell.read_together`."""
        window, s = state
        z, channels, delta = self._parts(inputs)
        channels, window = convolved(params["convolution"], channels, window, stretch)
        x, b, c, step, decay = self._terms(params, channels, delta)
        step, decay = (jnp.where(stretch.real[..., None], each, 0) for each in (step, decay))
        y, s = state_space(step[..., None] * x, decay, b, c, s, stretch.segment, self.settings.chunk_length)
        return self._output(params, y, x, z), (window, s)

    def _parts(self, inputs: Array) -> list[Array]:
        """z, what is convolved, and δ."""
        return jnp.split(inputs, [self._inner, self._inner + self._channels], axis=-1)

    def _terms(self, params: Params, channels: Array, delta: Array) -> tuple[Array, ...]:
        """x [… H P], B and C [… G N], Δ and log a [… H]."""
        s, lead = self.settings, channels.shape[:-1]
        size = s.groups * s.state_width
        x, b, c = jnp.split(channels, [self._inner, self._inner + size], axis=-1)
        b, c = (each.reshape(*lead, s.groups, s.state_width) for each in (b, c))
        x = x.reshape(*lead, self.settings.num_heads, s.head_width)
        return x, b, c, time_step(params, delta), log_decay(params, delta)

    def _output(self, params: Params, y: Array, x: Array, z: Array) -> Array:
        y = (y + params["skip"]["scale"][:, None] * x).reshape(z.shape) * jax.nn.silu(z)
        groups = (self.settings.groups, -1)
        y = rms_norm(
            y.reshape(*z.shape[:-1], *groups), jnp.ones(y.shape[-1] // groups[0]), self.settings.epsilon
        )
        y = y.reshape(z.shape) * params["norm"]["scale"]
        return linear(y, params["projection"]["kernel"], params["projection"].get("bias"))


def state_space(
    x: Float[Array, "T B H P"],
    log_decay: Float[Array, "T B H"],
    b: Float[Array, "T B G N"],
    c: Float[Array, "T B G N"],
    state: Float[Array, "B H P N"],
    segment: Int[Array, "T B"],
    length: int,
) -> tuple[Float[Array, "T B H P"], Float[Array, "B H P N"]]:
    """Reads rows of S ← exp(log_decay) S + x bᵀ, y = S c, chunk by chunk (sections 6 and 7 of the paper).

    In a chunk y is a product with scores (c_t · b_s) decayed from s to t, as in attention without a softmax.

    Args:
        x: what is written.
        log_decay: at most 0.
        b: where it is written, for each of G groups of heads.
        c: what is read.
        state: before the first token.
        segment: a state of another segment is not seen; 0 goes on from ``state``.
        length: of a chunk; the result is the same for any.

    Returns:
        y, and the state behind the last token.
    """
    rows, heads, groups = x.shape[1], x.shape[2], b.shape[2]
    length = min(length, len(x))
    grouped = (groups, heads // groups)
    steps, xs, bs, cs = len(x), *(in_chunks(length, each) for each in (x, b, c))
    xs = xs.reshape(*xs.shape[:3], *grouped, -1)
    d = decays(in_chunks(length, log_decay), in_chunks(length, segment, "edge"))
    by_group = lambda each: each.reshape(*each.shape[: each.ndim - 1], *grouped, 1)  # noqa: E731

    scores = jnp.einsum("ntbgk,nsbgk->nbgts", cs, bs)
    between = d.between.reshape(-1, rows, *grouped, length, length)
    y = jnp.einsum("nbgrts,nsbgrp->ntbgrp", between * scores[:, :, :, None], xs)

    written = jnp.einsum("nsbgrp,nsbgk->nbgrpk", by_group(d.to_end) * xs, bs)
    across = d.across.reshape(-1, rows, *grouped, 1, 1)
    one = lambda s, now: (now[0] * s + now[1], s)  # noqa: E731
    last, before = lax.scan(one, state.reshape(rows, *grouped, *state.shape[2:]), (across, written))
    y += by_group(d.from_start) * jnp.einsum("ntbgk,nbgrpk->ntbgrp", cs, before)
    return y.reshape(-1, *x.shape[1:])[:steps], last.reshape(state.shape)
