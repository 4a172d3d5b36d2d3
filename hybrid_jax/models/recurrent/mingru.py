"""The minimal gated recurrent unit (Feng et al. 2024, arXiv 2410.01201)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.layers import linear
from hybrid_jax.models.recurrent.linear import LinearCell, Terms
from hybrid_jax.models.recurrent.model import RecurrentModel, RecurrentSettings


@BACKBONES.register("mingru")
@settings
class MinGRU(RecurrentSettings):
    """Settings of a language model of minimal GRUs; see `MinGRUCell`."""

    residual: bool = True  # a layer adds to what it reads, normalised (RMS) before it

    def cell(self) -> MinGRUCell:
        """One layer."""
        return MinGRUCell(self.width)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class MinGRUCell(LinearCell):
    """The layer h ← (1 − z) h + z n with z = σ(W_z x + b_z) and n = W x + b: neither reads the state.

    The kernel [I 2W] holds z and n in this order (section 3.1 of the paper).
    """

    width: int

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`."""
        kernel = jax.nn.initializers.lecun_normal()(key, (inputs, 2 * self.width))
        return {"input": {"kernel": kernel, "bias": jnp.zeros(2 * self.width)}}

    def start(self, rows: int) -> Float[Array, "B W"]:
        """`Cell.start`."""
        return jnp.zeros((rows, self.width))

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Terms:
        """`LinearCell.prepared`."""
        z, n = jnp.split(linear(x, params["input"]["kernel"], params["input"]["bias"]), 2, axis=-1)
        # 1 − σ(z) = σ(−z), without the loss of digits near z = 1
        return jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * n, x

    def gates(self, params: Params, state: Float[Array, "B W"], inputs: Terms) -> dict[str, Array]:
        """`Cell.gates`."""
        return {"update": 1.0 - inputs[0]}

    def output(self, params: Params, h: Float[Array, "... W"], x: Float[Array, "... I"]) -> Array:
        """`LinearCell.output`: the state."""
        return h
