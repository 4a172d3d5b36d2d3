"""The real-gated linear recurrent unit (De et al. 2024, arXiv 2402.19427)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import Width, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import gelu_tanh, linear
from hybrid_jax.models.recurrent.linear import LinearCell, Terms
from hybrid_jax.models.recurrent.model import RecurrentModel, RecurrentSettings

_POWER = 8.0  # c, of the decay
_DECAYS = (0.9, 0.999)  # the range of a^c at the start


@BACKBONES.register("rg_lru")
@settings
class RGLRU(RecurrentSettings):
    """Settings of a language model of real-gated linear recurrent units; see `RGLRUCell`."""

    residual: bool = True  # a layer adds to what it reads, normalised (RMS) before it
    state_width: Width | None = None  # channels of the state; null: width

    def cell(self) -> RGLRUCell:
        """One layer."""
        return RGLRUCell(self.width, self.state_width or self.width)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class RGLRUCell(LinearCell):
    """The layer, with a state h [B S] and u = U x:

        r = σ(W_r u + b_r),  i = σ(W_i u + b_i)                              equations 1 and 2
        a = σ(Λ)^(c r),  c = 8                                               equation 3
        h ← a h + √(1 − a²) (i ∘ u)                                          equation 4
        y = P (gelu(G x) ∘ h)

    This is the recurrent block of the paper less its short convolution, with full maps for the gates, where the
    authors' code (google-deepmind/recurrentgemma) has blocks. That code leaves out the root at the first token
    of a sequence; here the equations hold there, too.
    """

    width: int
    state_width: int

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: σ(Λ)^c is uniform between 0.9 and 0.999."""
        s, normal = self.state_width, jax.nn.initializers.lecun_normal()
        keys = jax.random.split(key, 4)
        decay = jax.random.uniform(keys[0], (s,), minval=_DECAYS[0], maxval=_DECAYS[1]) ** (1.0 / _POWER)
        return {
            "input": {"kernel": normal(keys[1], (inputs, 2 * s))},
            "gates": {"kernel": normal(keys[2], (s, 2 * s)), "bias": jnp.zeros(2 * s)},
            "decay": {"logit": jnp.log(decay) - jnp.log1p(-decay)},
            "projection": {"kernel": normal(keys[3], (s, self.width))},
        }

    def start(self, rows: int) -> Float[Array, "B S"]:
        """`Cell.start`."""
        return jnp.zeros((rows, self.state_width))

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Terms:
        """`LinearCell.prepared`; what the output reads is the branch G x, beside the gate i for `gates`."""
        u, branch = jnp.split(linear(x, params["input"]["kernel"]), 2, axis=-1)
        gates = jax.nn.sigmoid(linear(u, params["gates"]["kernel"], params["gates"]["bias"]))
        r, i = jnp.split(gates, 2, axis=-1)
        log_a = _POWER * r * jax.nn.log_sigmoid(params["decay"]["logit"])
        # 1 − a² with the digits that it has near a = 1, kept above 0, where the slope of the root is infinite
        power = jnp.maximum(-jnp.expm1(2.0 * log_a), jnp.finfo(log_a.dtype).tiny)
        return jnp.exp(log_a), jnp.sqrt(power) * i * u, (branch, i)

    def gates(self, params: Params, state: Float[Array, "B S"], inputs: Terms) -> dict[str, Array]:
        """`Cell.gates`: the decay a, which joins r and Λ, and the input gate i."""
        decay, _, (_, i) = inputs
        return {"decay": decay, "input": i}

    def output(self, params: Params, h: Float[Array, "... S"], x: tuple[Array, Array]) -> Array:
        """`LinearCell.output`."""
        return linear(gelu_tanh(x[0]) * h, params["projection"]["kernel"])
