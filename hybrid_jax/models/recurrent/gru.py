"""The gated recurrent unit (Cho et al. 2014)."""

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

Reset = Literal["before", "after"]


@BACKBONES.register("gru")
@settings
class GRU(DenseRecurrence):
    """Settings of a GRU language model; see `GRUCell`."""

    reset: Reset = "before"  # the state is reset before or after the product with the recurrent kernel

    def __post_init__(self):
        super().__post_init__()
        if self.layer_norm and self.reset == "before":
            raise ValueError(
                "layer_norm needs reset: after, since it normalises the product that is then reset"
            )

    def cell(self) -> GRUCell:
        """One layer."""
        return GRUCell(self.width, self.reset, self.layer_norm)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class GRUCell(Cell):
    """The layer, with gates r = σ(W_r x + U_r h + b_r) and z = σ(W_z x + U_z h + b_z):

        before    n = tanh(W x + U (r h) + b)           h ← (1 − z) h + z n        Chung et al. 2014, eq. 5–8
        after     n = tanh(W x + b + r (U h + b'))      h ← (1 − z) n + z h        cuDNN, PyTorch and Flax

    The two also differ in what z = 1 means, each as its source has it. The kernels [I 3W] and [W 3W] hold r, z
    and n in this order. With ``layer_norm`` (Ba et al. 2016, eq. 23–25) W x and U h are normalised. The state
    is h.
    """

    width: int
    reset: Reset = "before"
    layer_norm: bool = False

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`: orthogonal recurrent maps for each gate."""
        params = init_products(key, inputs, self.width, self.width, gates=3, layer_norm=self.layer_norm)
        if self.reset == "after":
            params["candidate"] = {"bias": jnp.zeros(self.width)}
        return params

    def start(self, rows: int) -> Float[Array, "B W"]:
        """`Cell.start`."""
        return jnp.zeros((rows, self.width))

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Float[Array, "... 3W"]:
        """`Cell.prepared`: W x + b."""
        return input_product(params, x)

    def step(self, params: Params, state: Float[Array, "B W"], inputs: Float[Array, "B 3W"]):
        """`Cell.step`."""
        w, h = self.width, state
        if self.reset == "before":
            kernel = params["recurrent"]["kernel"]
            r, z = _gates(inputs[:, : 2 * w] + h @ kernel[:, : 2 * w])
            n = jnp.tanh(inputs[:, 2 * w :] + (r * h) @ kernel[:, 2 * w :])
            h = (1.0 - z) * h + z * n
        else:
            products = recurrent_product(params, h)
            r, z = _gates(inputs[:, : 2 * w] + products[:, : 2 * w])
            n = jnp.tanh(inputs[:, 2 * w :] + r * (products[:, 2 * w :] + params["candidate"]["bias"]))
            h = (1.0 - z) * n + z * h
        return h, h

    def gates(self, params: Params, state: Float[Array, "B W"], inputs: Float[Array, "B 3W"]):
        """`Cell.gates`."""
        # Neither W x + b nor U h of r and z depends on the convention.
        r, z = _gates((inputs + recurrent_product(params, state))[:, : 2 * self.width])
        return {"reset": r, "update": z}


def _gates(products: Float[Array, "B 2W"]) -> list[Array]:
    """The gates r and z."""
    return jnp.split(jax.nn.sigmoid(products), 2, axis=-1)
