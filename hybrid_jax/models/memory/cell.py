"""The layer that NTM and DNC share: a recurrent controller beside a memory that it reads and writes.

    h = controller([x, r])       r what the heads have read in the step before
    interface = W h + b          what to look for, to erase and to add; clipped
    memory, r = access(memory, interface)
    y = [h, r]

The state is the controller's, the memory and the weights of the heads, all of each row.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from annotated_types import Interval
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import Width, settings
from hybrid_jax.models.base import Params
from hybrid_jax.models.layers import linear
from hybrid_jax.models.recurrent.cell import Cell, State
from hybrid_jax.models.recurrent.elman import ElmanCell
from hybrid_jax.models.recurrent.gru import GRUCell
from hybrid_jax.models.recurrent.lstm import LSTMCell
from hybrid_jax.models.recurrent.model import RecurrentSettings

EMPTY = 1e-6  # every number of a memory at the start (Collier & Beel 2018, arXiv:1807.08518)
_LARGEST = 20.0  # of the interface, either way
Heads = Annotated[int, Interval(ge=1, le=64)]
Slots = Annotated[int, Interval(ge=1, le=2**14)]


@settings
class MemorySettings(RecurrentSettings):
    """Settings of layers with a memory; ``width`` is that of their controller."""

    controller: Literal["lstm", "gru", "elman"] = "lstm"  # the recurrent part of a layer
    num_slots: Slots = 128  # of the memory, M
    word_width: Width = 20  # numbers in a slot, W
    num_reads: Heads = 1  # heads that read

    def controller_cell(self) -> Cell:
        """The recurrent part."""
        if self.controller == "lstm":
            return LSTMCell(self.width, self.width)
        return GRUCell(self.width) if self.controller == "gru" else ElmanCell(self.width)


@dataclass(frozen=True)
class MemoryCell(Cell):
    """A controller with a memory; a kind of memory adds how it is addressed."""

    controller: Cell
    num_slots: int
    word_width: int
    num_reads: int
    gate_names: ClassVar[tuple[str, ...]] = ()  # the parts of the interface that are gates, before their σ

    @abstractmethod
    def empty(self, rows: int) -> Any:
        """The memory at the start, with ``reads`` [B R W]."""

    @property
    @abstractmethod
    def interface(self) -> Mapping[str, Sequence[int]]:
        """The shapes of what the controller says to the memory."""

    @abstractmethod
    def access(self, memory: Any, said: Mapping[str, Array]) -> Any:
        """Writes, then reads; ``said`` has the parts of `interface` as they leave the controller."""

    @abstractmethod
    def weights(self, memory: Any) -> dict[Literal["write", "read"], Float[Array, "B H M"]]:
        """The weights over the slots of each head that writes, and of each that reads, in the last step."""

    @cached_property
    def width(self) -> int:  # type: ignore[override]
        """The controller's width and R · W."""
        return self.controller.width + self.num_reads * self.word_width

    def init(self, key: Array, inputs: int) -> Params:
        """`Cell.init`."""
        keys = jax.random.split(key)
        said = sum(math.prod(shape) for shape in self.interface.values())
        kernel = jax.nn.initializers.lecun_normal()(keys[1], (self.controller.width, said))
        return {
            "controller": self.controller.init(keys[0], inputs + self.num_reads * self.word_width),
            "interface": {"kernel": kernel, "bias": jnp.zeros(said)},
        }

    def start(self, rows: int) -> State:
        """`Cell.start`."""
        return self.controller.start(rows), self.empty(rows)

    def prepared(self, params: Params, x: Float[Array, "... I"]) -> Any:
        """`Cell.prepared`: the controller's product with x, to which that with what was read is added later."""
        of_x, _ = self._kernels(params)
        own = params["controller"]
        return self.controller.prepared({**own, "input": {**own["input"], "kernel": of_x}}, x)

    def step(self, params: Params, state: State, inputs: Float[Array, "B G"]):
        """`Cell.step`."""
        of_controller, h, said = self._said(params, state, inputs)
        memory = self.access(state[1], said)
        return (of_controller, memory), jnp.concatenate([h, memory.reads.reshape(len(h), -1)], axis=-1)

    def gates(self, params: Params, state: State, inputs: Float[Array, "B G"]):
        """`Cell.gates`: those of the controller and those of the memory."""
        own, seen = params["controller"], self._with_reads(params, state[1], inputs)
        said = self._said(params, state, inputs)[2]
        of_memory = {name: jax.nn.sigmoid(said[name]) for name in self.gate_names}
        return {**self.controller.gates(own, state[0], seen), **of_memory}

    def _said(self, params: Params, state: State, inputs: Float[Array, "B G"]):
        """The controller's state and output after a token, and what it says to the memory."""
        seen = self._with_reads(params, state[1], inputs)
        of_controller, h = self.controller.step(params["controller"], state[0], seen)
        interface = linear(h, params["interface"]["kernel"], params["interface"]["bias"])
        return of_controller, h, _parts(jnp.clip(interface, -_LARGEST, _LARGEST), self.interface)

    def _with_reads(self, params: Params, memory: Any, inputs: Float[Array, "B G"]) -> Float[Array, "B G"]:
        """Inputs of the controller: the token beside the words that the heads have read."""
        return inputs + memory.reads.reshape(len(inputs), -1) @ self._kernels(params)[1]

    def _kernels(self, params: Params) -> tuple[Array, Array]:
        """The input kernel of the controller, for x and for what was read."""
        kernel = params["controller"]["input"]["kernel"]
        inputs = len(kernel) - self.num_reads * self.word_width
        return kernel[:inputs], kernel[inputs:]


def _parts(x: Float[Array, "B N"], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    parts, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        parts[name] = x[:, at : at + size].reshape(-1, *shape)
        at += size
    return parts
