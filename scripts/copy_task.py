"""Trains a Neural Turing Machine, a DNC or an LSTM to copy sequences of bits, and counts those they get wrong.

    python scripts/copy_task.py --cell ntm --folder runs/copy_ntm
    python scripts/copy_task.py --cell lstm --width 120 --folder runs/copy_lstm     as many parameters

The task and the settings are those of Graves et al. 2014, section 4.1: 1 to 20 vectors of 8 random bits and a
mark are read, then nothing more is read and the vectors are to be said again. RMSProp with momentum, clipping
of each number, one sequence an update. A line for every 1,000 sequences; the same command goes on where it was
stopped. At the end, 200 sequences of each of some lengths, also with the state emptied at the mark, where
nothing can be remembered.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.models.layers import linear
from hybrid_jax.models.memory.dnc import DNC
from hybrid_jax.models.memory.ntm import NTM
from hybrid_jax.models.recurrent.cell import Cell, Flow
from hybrid_jax.models.recurrent.lstm import LSTM

BITS, LONGEST = 8, 20
CELLS = {"ntm": NTM, "dnc": DNC, "lstm": LSTM}
OPTIMIZER = optax.chain(optax.clip(10.0), optax.rmsprop(1e-4, decay=0.95, momentum=0.9))


def sequences(key: jax.Array, rows: int, longest: int, shortest: int = 1):
    """Inputs [T B 9] with the mark in the last channel, targets [T B 8], and where they count [T B]."""
    of_length, of_bits = jax.random.split(key)
    lengths = jax.random.randint(of_length, (rows,), shortest, longest + 1)
    bits = jax.random.bernoulli(of_bits, 0.5, (longest, rows, BITS)).astype(jnp.float32)
    at = jnp.arange(2 * longest + 1)[:, None]
    told, asked = at < lengths, (at > lengths) & (at <= 2 * lengths)
    of = lambda index: jnp.take_along_axis(bits, jnp.clip(index, 0, longest - 1)[..., None], axis=0)  # noqa: E731
    inputs = jnp.concatenate([of(at + 0 * lengths) * told[..., None], (at == lengths)[..., None]], axis=-1)
    return inputs, of(at - lengths - 1) * asked[..., None], asked


def scores(cell: Cell, params: Any, inputs: jax.Array, empty_at_mark: bool = False) -> jax.Array:
    """Scores of the bits at every step [T B 8]."""
    real = jnp.ones(inputs.shape[:2], bool)
    flow = Flow(real, inputs[..., -1] > 0) if empty_at_mark else None
    y, _ = cell.read(params["cell"], inputs, cell.start(inputs.shape[1]), flow)
    return linear(y, params["head"]["kernel"], params["head"]["bias"])


def wrong_bits(scores: jax.Array, targets: jax.Array, asked: jax.Array) -> jax.Array:
    """Bits wrong in each row [B]."""
    return jnp.sum(((scores > 0) != (targets > 0.5)) & asked[..., None], axis=(0, 2))


@partial(jax.jit, static_argnums=(0, 3, 4), donate_argnums=(1,))
def trained(cell: Cell, state: Any, first: jax.Array, count: int, batch: int, seed: jax.Array):
    """The state after ``count`` more updates, and bits wrong a sequence, on average over them."""

    def loss(params: Any, batch: Any):
        inputs, targets, asked = batch
        given = scores(cell, params, inputs)
        losses = optax.sigmoid_binary_cross_entropy(given, targets) * asked[..., None]
        return jnp.sum(losses) / (BITS * jnp.sum(asked)), wrong_bits(given, targets, asked).mean()

    def update(state: Any, number: jax.Array):
        params, of_optimizer = state
        data = sequences(jax.random.fold_in(jax.random.key(seed), number), batch, LONGEST)
        grads, wrong = jax.grad(loss, has_aux=True)(params, data)
        updates, of_optimizer = OPTIMIZER.update(grads, of_optimizer, params)
        return (optax.apply_updates(params, updates), of_optimizer), wrong

    state, wrong = jax.lax.scan(update, state, first + jnp.arange(count))
    return state, wrong.mean()


@partial(jax.jit, static_argnums=(0, 2, 3))
def wrong_share(cell: Cell, params: Any, length: int, empty_at_mark: bool):
    """Share of bits wrong in 200 new sequences of one length."""
    inputs, targets, asked = sequences(jax.random.key(length), 200, length, length)
    given = scores(cell, params, inputs, empty_at_mark)
    return wrong_bits(given, targets, asked).mean() / (length * BITS)


def begun(cell: Cell, seed: int) -> Any:
    """Random parameters, and the optimizer's state."""
    of_cell, of_head = jax.random.split(jax.random.key(seed))
    kernel = jax.nn.initializers.lecun_normal()(of_head, (cell.width, BITS))
    params = {"cell": cell.init(of_cell, BITS + 1), "head": {"kernel": kernel, "bias": jnp.zeros(BITS)}}
    return params, OPTIMIZER.init(params)


def saved(path: Path, state: Any, number: int) -> None:
    """Writes the state; a reader never sees half a file."""
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, *jax.tree.leaves(state), number=number)
    os.replace(path.with_suffix(".part"), path)


def loaded(path: Path, state: Any) -> tuple[Any, int]:
    """The state that was saved last, and how many updates it has had; the given one and 0 if there is none."""
    if not path.exists():
        return state, 0
    with np.load(path) as file:
        leaves = [file[f"arr_{i}"] for i in range(len(jax.tree.leaves(state)))]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), int(file["number"])


def main(arguments: list[str]) -> None:
    """Trains, prints, evaluates."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", choices=CELLS, default="ntm")
    parser.add_argument("--width", type=int, default=100, help="of the controller, or of the LSTM")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--word-width", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=1, help="sequences an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    sizes = {} if given.cell == "lstm" else {"num_slots": given.slots, "word_width": given.word_width}
    cell = CELLS[given.cell](width=given.width, **sizes).cell()
    given.folder.mkdir(parents=True, exist_ok=True)
    state, number = loaded(given.folder / "state.npz", begun(cell, given.seed))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(state[0])):,} parameters", flush=True)
    count, start = max(1000 // given.batch, 1), time.monotonic()
    while (number + count) * given.batch <= given.sequences:
        state, wrong = trained(cell, state, jnp.array(number), count, given.batch, jnp.array(given.seed))
        number += count
        line = f"{number * given.batch:,} sequences  {wrong:.2f} bits wrong  {time.monotonic() - start:.0f} s"
        print(line, flush=True)
        with open(given.folder / "curve.txt", "a") as file:
            file.write(line + "\n")
        saved(given.folder / "state.npz", state, number)
    for length in (10, 20, 40, 80):
        shares = [float(wrong_share(cell, state[0], length, empty)) for empty in (False, True)]
        print(
            f"length {length}: {shares[0]:.2%} of bits wrong, {shares[1]:.2%} with the state emptied",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
