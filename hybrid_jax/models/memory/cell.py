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
from typing import Annotated, Any, Literal

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
        of_controller, memory = state
        _, of_reads = self._kernels(params)
        inputs = inputs + memory.reads.reshape(len(inputs), -1) @ of_reads
        of_controller, h = self.controller.step(params["controller"], of_controller, inputs)
        interface = linear(h, params["interface"]["kernel"], params["interface"]["bias"])
        memory = self.access(memory, _parts(jnp.clip(interface, -_LARGEST, _LARGEST), self.interface))
        return (of_controller, memory), jnp.concatenate([h, memory.reads.reshape(len(h), -1)], axis=-1)

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
