"""The simple recurrent network (Elman 1990)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES, Params
from hybrid_jax.models.recurrent.cell import Cell
from hybrid_jax.models.recurrent.dense import DenseRecurrence, init_products, input_product, recurrent_product
from hybrid_jax.models.recurrent.model import RecurrentModel

Activation = Literal["tanh", "relu"]


@BACKBONES.register("elman")
@settings
class Elman(DenseRecurrence):
    """Settings of an Elman language model; see `ElmanCell`."""

    activation: Activation = "tanh"  # f

    def cell(self) -> ElmanCell:
        """One layer."""
        return ElmanCell(self.width, self.activation, self.layer_norm)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class ElmanCell(Cell):
    """The layer h ← f(W x + U h + b), whose state is h; with ``layer_norm``, W x and U h are normalised."""

    width: int
    activation: Activation = "tanh"
    layer_norm: bool = False

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: an orthogonal recurrent map."""
        return init_products(key, inputs, self.width, self.width, gates=1, layer_norm=self.layer_norm)

    def start(self, rows: int) -> Float[Array, "B W"]:
        """`Cell.start`."""
        return jnp.zeros((rows, self.width))

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Float[Array, "... W"]:
        """`Cell.prepared`: W x + b."""
        return input_product(params, x)

    def step(self, params: Params, state: Float[Array, "B W"], inputs: Float[Array, "B W"]):
        """`Cell.step`."""
        activate = jnp.tanh if self.activation == "tanh" else jax.nn.relu
        h = activate(inputs + recurrent_product(params, state))
        return h, h
