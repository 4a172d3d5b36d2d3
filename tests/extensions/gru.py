"""A recurrent backbone: a gated unit of one gate over token embeddings, whose cache is its state.

z = σ(W_z x + U_z h + b_z),   h ← (1 − z) h + z tanh(W x + U h + b)        a GRU that never resets
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax import Cell, RecurrentModel, RecurrentSettings, settings


@settings
class GRU(RecurrentSettings):
    """Settings of the model; `build` is what a config asks for."""

    def cell(self) -> "GatedCell":
        """One layer."""
        return GatedCell(self.width)

    def build(self, vocab_size: int | None = None) -> RecurrentModel:
        """The model for a tokenizer of ``vocab_size`` tokens."""
        return RecurrentModel(self.sized(vocab_size))


@dataclass(frozen=True)
class GatedCell(Cell):
    """The layer: h is its state and what it gives."""

    width: int

    def init(self, key: Any, inputs: int) -> Any:
        """Random parameters."""
        keys, draw = jax.random.split(key), jax.nn.initializers.lecun_normal()
        return {
            "input": {"kernel": draw(keys[0], (inputs, 2 * self.width)), "bias": jnp.zeros(2 * self.width)},
            "recurrent": {"kernel": draw(keys[1], (self.width, 2 * self.width))},
        }

    def start(self, rows: int) -> Any:
        """Nothing is read yet."""
        return jnp.zeros((rows, self.width))

    def prepared(self, params: Any, x: Any) -> Any:
        """The part that does not need the state, for all tokens at once."""
        return x @ params["input"]["kernel"] + params["input"]["bias"]

    def step(self, params: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        """Reads one token a row."""
        z, new = jnp.split(inputs + state @ params["recurrent"]["kernel"], 2, axis=-1)
        z = jax.nn.sigmoid(z)
        h = (1 - z) * state + z * jnp.tanh(new)
        return h, h
