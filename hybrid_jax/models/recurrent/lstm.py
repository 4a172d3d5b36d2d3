"""Long short-term memory (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import Finite, Width, settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.recurrent.cell import Cell
from hybrid_jax.models.recurrent.dense import (
    DenseRecurrence,
    init_norm,
    init_products,
    input_product,
    norm_of,
    recurrent_product,
)
from hybrid_jax.models.recurrent.model import RecurrentModel

State = tuple[Float[Array, "B W"], Float[Array, "B D"]]


@BACKBONES.register("lstm")
@settings
class LSTM(DenseRecurrence):
    """Settings of an LSTM language model; see `LSTMCell`."""

    forget_bias: Finite = 1.0  # initial bias of the forget gates (Jozefowicz et al. 2015)
    projection_width: Width | None = None  # of what a layer gives, a map of its state; null: width, no map

    def cell(self) -> LSTMCell:
        """One layer."""
        return LSTMCell(self.projection_width or self.width, self.width, self.forget_bias, self.layer_norm)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class LSTMCell(Cell):
    """The layer, with gates σ for input, forgetting and output:

        i, f, g, o = W x + U h + b                              kernels [I 4W] and [D 4W], in this order
        c ← σ(f) c + σ(i) tanh(g)
        h ← P σ(o) tanh(c)                                      no projection P where D = W

    With ``layer_norm`` (Ba et al. 2016, eq. 20–22) W x, U h and the c that the output reads are normalised. The
    state is (c, h), zero at the start.
    """

    width: int
    state_width: int
    forget_bias: float = 1.0
    layer_norm: bool = False

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: orthogonal recurrent maps for each gate."""
        w = self.state_width
        keys = jax.random.split(key)
        params = init_products(keys[0], inputs, self.width, w, gates=4, layer_norm=self.layer_norm)
        params["input"]["bias"] = params["input"]["bias"].at[w : 2 * w].set(self.forget_bias)
        if self.width != w:
            params["projection"] = {"kernel": jax.nn.initializers.lecun_normal()(keys[1], (w, self.width))}
        return {**params, "norm_state": init_norm(w)} if self.layer_norm else params

    def start(self, rows: int) -> State:
        """`Cell.start`."""
        return jnp.zeros((rows, self.state_width)), jnp.zeros((rows, self.width))

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Float[Array, "... 4W"]:
        """`Cell.prepared`: W x + b."""
        return input_product(params, x)

    def step(self, params: Params, state: State, inputs: Float[Array, "B 4W"]):
        """`Cell.step`."""
        c, h = state
        i, f, g, o = _products(params, h, inputs)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(norm_of(params, "norm_state", c))
        if self.width != self.state_width:
            h = h @ params["projection"]["kernel"]
        return (c, h), h

    def gates(self, params: Params, state: State, inputs: Float[Array, "B 4W"]):
        """`Cell.gates`."""
        i, f, _, o = map(jax.nn.sigmoid, _products(params, state[1], inputs))
        return {"input": i, "forget": f, "output": o}


def _products(params: Params, h: Float[Array, "B D"], inputs: Float[Array, "B 4W"]) -> list[Array]:
    """W x + U h + b of i, f, g and o."""
    return jnp.split(inputs + recurrent_product(params, h), 4, axis=-1)
