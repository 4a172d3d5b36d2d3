"""Shared by Elman's network, LSTM and GRU: two full maps, of the input and of the state, to all gates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import Rate, settings
from hybrid_jax.models.base import Params
from hybrid_jax.models.layers import layer_norm as normalized
from hybrid_jax.models.layers import linear
from hybrid_jax.models.recurrent.model import RecurrentSettings, drop

_EPSILON = 1e-5  # added to the variance


@settings
class DenseRecurrence(RecurrentSettings):
    """Settings of layers whose state is mapped by a full matrix."""

    layer_norm: bool = False  # normalise the products in a cell (Ba et al. 2016)
    recurrent_dropout: Rate = 0.0  # of single weights of the recurrent kernels, drawn once a step of training

    def dropped(self, params: Params, key: Array) -> Params:
        """`RecurrentSettings.dropped`: DropConnect on the recurrent kernel (Merity et al. 2018, section 3)."""
        if not self.recurrent_dropout:
            return params
        kernel = params["recurrent"]["kernel"]
        return {**params, "recurrent": {"kernel": drop(kernel, self.recurrent_dropout, key, kernel.shape)}}


def init_products(key: Array, inputs: int, outputs: int, width: int, *, gates: int, layer_norm: bool) -> Params:
    """The maps "input" [I G·W] with a bias, and "recurrent" [D G·W], orthogonal for each gate.

    Args:
        key: for the random numbers.
        inputs: I, channels that the layer reads.
        outputs: D, channels that it gives and reads back.
        width: W, of a gate.
        gates: G.
        layer_norm: whether each product has a norm.
    """
    of_input, *of_gates = jax.random.split(key, 1 + gates)
    orthogonal = jax.nn.initializers.orthogonal()
    kernel = jax.nn.initializers.lecun_normal()(of_input, (inputs, gates * width))
    params: Params = {
        "input": {"kernel": kernel, "bias": jnp.zeros(gates * width)},
        "recurrent": {"kernel": jnp.concatenate([orthogonal(k, (outputs, width)) for k in of_gates], axis=1)},
    }
    norms = {f"norm_{name}": init_norm(gates * width) for name in ("input", "recurrent")}
    return {**params, **norms} if layer_norm else params


def input_product(params: Params, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    """``W x + b``, W x normalised if the cell has norms."""
    kernel, bias = params["input"]["kernel"], params["input"]["bias"]
    if "norm_input" not in params:
        return linear(x, kernel, bias)
    return norm_of(params, "norm_input", linear(x, kernel)) + bias


def recurrent_product(params: Params, h: Float[Array, "B D"]) -> Float[Array, "B O"]:
    """``U h``, normalised if the cell has norms."""
    return norm_of(params, "norm_recurrent", h @ params["recurrent"]["kernel"])


def init_norm(width: int) -> Params:
    """A layer norm that scales by 1."""
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def norm_of(params: Params, name: str, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
    """``x`` by the layer norm of that name, if the layer has it."""
    if name not in params:
        return x
    return normalized(x, params[name]["scale"], params[name]["bias"], _EPSILON)
