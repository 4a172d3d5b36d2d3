"""The part that recurrent models differ in: a cell, one step of a layer as a pure function.

    state, y = step(params, state, inputs)        inputs = prepared(params, x)

`RecurrentModel` makes a language model of any cell: embedding, a stack of layers, head, cache, packed rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float

from hybrid_jax.core.arrays import choose_rows
from hybrid_jax.models.base import Params

State = Any  # a pytree of arrays [B ...]
Inputs = Any  # a pytree of arrays [T B ...], or [B ...] of one token


@struct.dataclass
class Flow:
    """Where a row of tokens is real, and where it begins anew."""

    real: Bool[Array, "T B"]  # False is padding, which leaves the state as it is
    begins: Bool[Array, "T B"] | None = None  # the first token of a packed sequence; None goes on throughout


class Cell(ABC):
    """A layer that reads tokens in their order. Make it a frozen dataclass, so that it can be hashed."""

    width: int  # channels of what the layer gives, D

    @abstractmethod
    def init(self, key: Array, inputs: int) -> Params:
        """Random parameters for inputs of that many channels; a linear map is a leaf ``kernel`` [I O]."""

    @abstractmethod
    def start(self, rows: int) -> State:
        """The state of rows that have read nothing: the same numbers for each."""

    @abstractmethod
    def step(self, params: Params, state: State, inputs: Inputs) -> tuple[State, Float[Array, "B D"]]:
        """Reads one token a row."""

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Inputs:
        """Computes what needs no state, for all tokens at once, such as the product with the input kernel."""
        return x

    def gates(self, params: Params, state: State, inputs: Inputs) -> dict[str, Float[Array, "B ..."]]:
        """The gates, in [0, 1], with which it reads one token a row, for diagnostics; empty if it has none."""
        return {}

    def flops(self) -> int:
        """FLOPs of a step beside the products with kernels, a multiply-add being 2: reading a memory, say."""
        return 0

    def read(
        self, params: Params, x: Float[Array, "T B I"], state: State, flow: Flow | None = None
    ) -> tuple[Float[Array, "T B D"], State]:
        """Reads whole rows, token by token; a cell that can do it faster has a `read` of its own.

        Args:
            params: of the layer.
            x: what the layer reads.
            state: before the first token.
            flow: None where every token is real and none begins anew.

        Returns:
            What the layer gives at each token, and the state behind the last.
        """
        start = self.start(x.shape[1])

        def one(state: State, now: tuple[Inputs, Flow | None]):
            inputs, flow = now
            if flow is not None and flow.begins is not None:
                state = choose_rows(flow.begins, start, state)
            after, y = self.step(params, state, inputs)
            return after if flow is None else choose_rows(flow.real, after, state), y

        state, y = lax.scan(one, state, (self.prepared(params, x), flow))
        return y, state
