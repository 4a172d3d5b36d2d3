"""The linear recurrent unit (Orvieto et al. 2023, arXiv 2303.06349)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from hybrid_jax.core.ranges import Fraction, Positive, Width, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import gelu_tanh, linear
from hybrid_jax.models.recurrent.linear import LinearCell, Terms
from hybrid_jax.models.recurrent.model import RecurrentModel, RecurrentSettings


@BACKBONES.register("lru")
@settings
class LRU(RecurrentSettings):
    """Settings of a language model of linear recurrent units; see `LRUCell`."""

    residual: bool = True  # a layer adds to what it reads, normalised (RMS) before it
    state_width: Width | None = None  # complex channels of the state; null: width
    min_radius: Fraction = 0.9  # of the eigenvalues at the start: 0.9 halves a state in 7 tokens, 0.999 in 693
    max_radius: Fraction = 0.999  # the largest at the start
    max_phase: Positive = 2 * math.pi  # of the eigenvalues at the start, in radians a token

    def __post_init__(self):
        super().__post_init__()
        if not self.min_radius < self.max_radius:
            raise ValueError(f"max_radius must be above min_radius {self.min_radius}, got {self.max_radius}")

    def cell(self) -> LRUCell:
        """One layer."""
        radii = (self.min_radius, self.max_radius)
        return LRUCell(self.width, self.state_width or self.width, radii, self.max_phase)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class LRUCell(LinearCell):
    """The layer, with a complex state h [B S] and eigenvalues λ inside the unit circle:

        h ← λ h + γ (B x),      λ = exp(−exp(ν) + i exp(θ)),      γ = √(1 − |λ|²)      equations 5–7
        y = gelu(Re(C h) + D x)                                                        D diagonal, if I = W

    γ keeps a state of the size of its input; it follows λ in training. The GELU is that of the paper's block.
    The kernels are real: B [I 2S] and C [2S W], real parts first.
    """

    width: int
    state_width: int
    radii: tuple[float, float] = (0.9, 0.999)
    max_phase: float = 2 * math.pi

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: eigenvalues uniform on the ring between the radii (lemma 3.2)."""
        s, (least, most) = self.state_width, self.radii
        keys = jax.random.split(key, 5)
        squared = jax.random.uniform(keys[0], (s,), minval=least**2, maxval=most**2)
        phase = self.max_phase * jax.random.uniform(keys[1], (s,), minval=1e-4)
        params: Params = {
            "eigenvalues": {"log_rate": jnp.log(-0.5 * jnp.log(squared)), "log_phase": jnp.log(phase)},
            "input": {"kernel": jax.random.normal(keys[2], (inputs, 2 * s)) / math.sqrt(2 * inputs)},
            "projection": {"kernel": jax.random.normal(keys[3], (2 * s, self.width)) / math.sqrt(s)},
        }
        if inputs == self.width:
            params["skip"] = {"scale": jax.random.normal(keys[4], (inputs,))}
        return params

    def start(self, rows: int) -> Complex[Array, "B S"]:
        """`Cell.start`."""
        return jnp.zeros((rows, self.state_width), jnp.complex64)

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Terms:
        """`LinearCell.prepared`."""
        eigenvalues = params["eigenvalues"]
        rate, phase = jnp.exp(eigenvalues["log_rate"]), jnp.exp(eigenvalues["log_phase"])
        of_input = linear(x, params["input"]["kernel"])
        real, imaginary = jnp.split(jnp.sqrt(-jnp.expm1(-2.0 * jnp.tile(rate, 2))) * of_input, 2, axis=-1)
        b = jax.lax.complex(real, imaginary)
        return jnp.broadcast_to(jnp.exp(jax.lax.complex(-rate, phase)), b.shape), b, x

    def output(self, params: Params, h: Complex[Array, "... S"], x: Float[Array, "... I"]) -> Array:
        """`LinearCell.output`."""
        y = linear(jnp.concatenate([h.real, h.imag], axis=-1), params["projection"]["kernel"])
        return gelu_tanh(y + params["skip"]["scale"] * x if "skip" in params else y)
