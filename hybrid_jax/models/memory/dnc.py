"""The differentiable neural computer (Graves et al. 2016, Nature 538, doi:10.1038/nature20101)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.memory.cell import EMPTY, MemoryCell, MemorySettings
from hybrid_jax.models.memory.content import content_weights, read, write
from hybrid_jax.models.memory.dnc_addressing import (
    allocation,
    link_after,
    precedence_after,
    read_weights,
    usage_after,
    write_weights,
)
from hybrid_jax.models.recurrent.model import RecurrentModel


@BACKBONES.register("dnc")
@settings
class DNC(MemorySettings):
    """Settings of a differentiable neural computer as a language model; see `DNCCell`."""

    def cell(self) -> DNCCell:
        """One layer."""
        return DNCCell(self.controller_cell(), self.num_slots, self.word_width, self.num_reads)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


class DNCMemory(NamedTuple):
    """The memory of some rows."""

    slots: Float[Array, "B M W"]
    reads: Float[Array, "B R W"]  # what was read last
    usage: Float[Array, "B M"]  # in [0, 1]
    written: Float[Array, "B M"]  # where was written last
    read_weights: Float[Array, "B R M"]  # where was read last
    link: Float[Array, "B M M"]  # [i, j]: slot i was written right after slot j
    precedence: Float[Array, "B M"]  # how much each slot was written last


@dataclass(frozen=True)
class DNCCell(MemoryCell):
    """The layer, to the equations of the paper; `dnc_addressing` has them.

        oneplus(x) = 1 + log(1 + eˣ) for strengths;  σ for gates and what is erased;  softmax for modes
        modes are backward, content, forward, in this order

    It writes, then reads. DeepMind's own code (google-deepmind/dnc) differs from the paper: softplus for
    strengths, modes in the order backward, forward, content, usage kept above 1e-6 in the allocation, no
    gradient through the writing in the usage. Here the paper is followed, but for the start of the memory at
    1e-6 and the clipping of the interface at ±20, which that code has for the controller.
    """

    gate_names = ("free", "allocate", "write")

    def empty(self, rows: int) -> DNCMemory:
        """`MemoryCell.empty`."""
        m, w, r = self.num_slots, self.word_width, self.num_reads
        shapes = ((r, w), (m,), (m,), (r, m), (m, m), (m,))
        return DNCMemory(jnp.full((rows, m, w), EMPTY), *(jnp.zeros((rows, *shape)) for shape in shapes))

    @cached_property
    def interface(self) -> Mapping[str, tuple[int, ...]]:
        """`MemoryCell.interface`."""
        reads, word = self.num_reads, self.word_width
        of_reads = {"key": (reads, word), "strength": (reads,), "free": (reads,), "modes": (reads, 3)}
        of_write = {"write_key": (1, word), "write_strength": (1,), "erase": (1, word), "add": (1, word)}
        return {**of_reads, **of_write, "allocate": (), "write": ()}

    def access(self, memory: DNCMemory, said: Mapping[str, Array]) -> DNCMemory:
        """`MemoryCell.access`."""
        free, allocate, writes = (jax.nn.sigmoid(said[name]) for name in ("free", "allocate", "write"))
        usage = usage_after(memory.usage, memory.written, memory.read_weights, free)
        content = content_weights(memory.slots, said["write_key"], _oneplus(said["write_strength"]))[:, 0]
        written = write_weights(content, allocation(usage), allocate, writes)
        slots = write(memory.slots, written[:, None], jax.nn.sigmoid(said["erase"]), said["add"])
        link = link_after(memory.link, memory.precedence, written)
        precedence = precedence_after(memory.precedence, written)
        content = content_weights(slots, said["key"], _oneplus(said["strength"]))
        modes = jax.nn.softmax(said["modes"])
        weights = read_weights(link, memory.read_weights, content, modes)
        return DNCMemory(slots, read(slots, weights), usage, written, weights, link, precedence)

    def weights(self, memory: DNCMemory):
        """`MemoryCell.weights`."""
        return {"write": memory.written[:, None], "read": memory.read_weights}

    def flops(self) -> int:
        """`Cell.flops`."""
        a_slot = 2 * self.word_width * (2 * self.num_reads + 3)
        return self.num_slots * (a_slot + self.num_slots * (5 + 4 * self.num_reads))


def _oneplus(x: Array) -> Array:
    return 1.0 + jax.nn.softplus(x)
