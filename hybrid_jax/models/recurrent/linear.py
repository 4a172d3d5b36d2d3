"""Cells that are linear in their state, so that a whole row is read by an associative scan, not step by step.

h_t = a_t h_{t−1} + b_t                      a and b [T B W] depend on the input alone; h is zero at the start
(a, b) then (a', b')  =  (a' a, a' b + b')   two stretches together: log₂ T rounds (Blelloch 1990)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from hybrid_jax.models.base import Params
from hybrid_jax.models.recurrent.cell import Cell, Flow

Terms = tuple[Shaped[Array, "... W"], Shaped[Array, "... W"], Any]  # a, b and what the output reads, x


class LinearCell(Cell):
    """A cell of which a subclass says the terms and what it gives. Its state is h."""

    @abstractmethod
    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Terms:
        """a, b and what the output reads beside h."""

    @abstractmethod
    def output(self, params: Params, h: Shaped[Array, "... W"], x: Any) -> Array:
        """The output of the layer, from the state behind each token."""

    def step(self, params: Params, state: Shaped[Array, "B W"], inputs: Terms):
        """`Cell.step`."""
        a, b, x = inputs
        h = a * state + b
        return h, self.output(params, h, x)

    def read(self, params, x, state, flow: Flow | None = None):
        """`Cell.read`: all tokens at once."""
        a, b, x = self.prepared(params, x)
        if flow is not None:
            if flow.begins is not None:
                a = jnp.where(flow.begins[..., None], 0, a)
            a = jnp.where(flow.real[..., None], a, 1)
            b = jnp.where(flow.real[..., None], b, 0)
        b = b.at[0].add(a[0] * state)
        _, h = lax.associative_scan(_joined, (a, b))
        return self.output(params, h, x), h[-1]


def _joined(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, b), (later_a, later_b) = left, right
    return later_a * a, later_a * b + later_b
