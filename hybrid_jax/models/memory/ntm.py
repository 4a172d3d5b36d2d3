"""The Neural Turing Machine (Graves et al. 2014, arXiv:1410.5401)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Interval
from jaxtyping import Array, Float

from hybrid_jax.core.ranges import settings
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.memory.cell import EMPTY, Heads, MemoryCell, MemorySettings
from hybrid_jax.models.memory.content import content_weights, read, write
from hybrid_jax.models.memory.ntm_addressing import interpolated, sharpened, shifted
from hybrid_jax.models.recurrent.model import RecurrentModel


@BACKBONES.register("ntm")
@settings
class NTM(MemorySettings):
    """Settings of a Neural Turing Machine as a language model; see `NTMCell`."""

    num_writes: Heads = 1  # heads that write
    max_shift: Annotated[int, Interval(ge=1, le=16)] = 1  # slots that a head may move by in a step

    def cell(self) -> NTMCell:
        """One layer."""
        sizes = (self.num_slots, self.word_width, self.num_reads)
        return NTMCell(self.controller_cell(), *sizes, self.num_writes, self.max_shift)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


class NTMMemory(NamedTuple):
    """The memory of some rows. The heads that write come before those that read."""

    slots: Float[Array, "B M W"]
    reads: Float[Array, "B R W"]  # what was read last
    weights: Float[Array, "B H M"]  # where each head is; sums to 1


@dataclass(frozen=True)
class NTMCell(MemoryCell):
    """The layer: every head is led by content, may hold on to where it was, moves and is focused.

        w = sharpen(shift(g softmax(β cos(k, M)) + (1 − g) w, s), γ)
        β = softplus, γ = 1 + softplus, g = σ, s = softmax, e = σ, k = tanh, a = tanh

    The writing heads move first, all erase, then all add; the reading heads then find and read what is there
    after it. The paper leaves open: this order; the ranges of k and a, tanh here as in Collier & Beel 2018
    (arXiv:1807.08518), from whom the memory's start at 1e-6 and the clipping of the interface at ±20 are, too;
    and where heads begin, here at the first slot.
    """

    num_writes: int
    max_shift: int
    gate_names = ("gate",)

    def empty(self, rows: int) -> NTMMemory:
        """`MemoryCell.empty`."""
        slots = jnp.full((rows, self.num_slots, self.word_width), EMPTY)
        heads = jnp.zeros((rows, self._heads, self.num_slots)).at[..., 0].set(1.0)
        return NTMMemory(slots, jnp.zeros((rows, self.num_reads, self.word_width)), heads)

    @cached_property
    def interface(self) -> Mapping[str, tuple[int, ...]]:
        """`MemoryCell.interface`."""
        heads, word = self._heads, self.word_width
        addressing = {"key": (heads, word), "strength": (heads,), "gate": (heads,), "power": (heads,)}
        written = (self.num_writes, word)
        return {**addressing, "shift": (heads, 2 * self.max_shift + 1), "erase": written, "add": written}

    def access(self, memory: NTMMemory, said: Mapping[str, Array]) -> NTMMemory:
        """`MemoryCell.access`."""
        writing, reading = slice(None, self.num_writes), slice(self.num_writes, None)
        w = _moved(memory, said, writing)
        slots = write(memory.slots, w, jax.nn.sigmoid(said["erase"]), jnp.tanh(said["add"]))
        memory = memory._replace(slots=slots)
        r = _moved(memory, said, reading)
        return NTMMemory(slots, read(slots, r), jnp.concatenate([w, r], axis=1))

    def weights(self, memory: NTMMemory):
        """`MemoryCell.weights`."""
        return {
            "write": memory.weights[:, : self.num_writes],
            "read": memory.weights[:, self.num_writes :],
        }

    def flops(self) -> int:
        """`Cell.flops`."""
        a_slot = 2 * self.word_width * (self._heads + self.num_reads + 2 * self.num_writes)
        return self.num_slots * (a_slot + 2 * self._heads * (2 * self.max_shift + 1))

    @property
    def _heads(self) -> int:
        return self.num_writes + self.num_reads


def _moved(memory: NTMMemory, said: Mapping[str, Array], heads: slice) -> Float[Array, "B H M"]:
    """The weights of some of the heads after this step."""
    key, strength, gate, power, shift = (
        said[name][:, heads] for name in ("key", "strength", "gate", "power", "shift")
    )
    weights = content_weights(memory.slots, jnp.tanh(key), jax.nn.softplus(strength))
    weights = interpolated(weights, memory.weights[:, heads], jax.nn.sigmoid(gate))
    return sharpened(shifted(weights, jax.nn.softmax(shift)), 1.0 + jax.nn.softplus(power))
