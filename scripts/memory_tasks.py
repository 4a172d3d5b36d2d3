"""Trains a recurrent network on a task that needs a memory, and counts what it gets wrong.

    python scripts/memory_tasks.py --task copy --cell ntm --folder runs/copy_ntm
    python scripts/memory_tasks.py --task copy --cell lstm --width 120 --folder runs/copy_lstm
    python scripts/memory_tasks.py --task adding --cell lstm --sequences 250000 --folder runs/adding

    copy          1 to 20 vectors of 8 random bits and a mark are read, and then said again (Graves et al. 2014)
    repeat_copy   1 to 2 vectors of 4 bits, 1 or 2 times as the mark tells, and an end (google-deepmind/dnc)
    long_repeat_copy    the same of 1 to 8 vectors
    adding        the sum of the 2 marked ones of 100 numbers in [0, 1] (Hochreiter & Schmidhuber 1997)
    copy_memory   10 symbols out of 8, said again after 100 blanks (Arjovsky et al. 2016)
    associative_recall  16 pairs of symbols out of 64, then each key, for its value

The first two have the settings of their sources, the others Adam. `--cell bank` is an LSTM beside a bank of
`--slots` pairs, written as they are told, first in, first out, and looked up by a learned query. There is a
line for every 1,000 sequences where they are learned one by one, for every 10,000 else. The same command goes
on where it was stopped. At the end come new sequences, also with the state emptied where the answer begins:
nothing can be remembered then.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.layers import linear
from hybrid_jax.models.memory.bank import Bank
from hybrid_jax.models.memory.dnc import DNC, DNCCell, DNCMemory
from hybrid_jax.models.memory.ntm import NTM
from hybrid_jax.models.recurrent.cell import Cell, Flow
from hybrid_jax.models.recurrent.elman import Elman
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lstm import LSTM

SYMBOLS, BLANK, GO = 8, 8, 9  # of copy_memory
CHOICES = 64  # of associative_recall
CELLS = {"ntm": NTM, "dnc": DNC, "lstm": LSTM, "gru": GRU, "elman": Elman, "bank": LSTM}


@struct.dataclass
class Batch:
    """Sequences, what is to be said, and where."""

    inputs: Float[Array, "T B I"]
    targets: Float[Array, "T B O"]
    asked: Bool[Array, "T B"]
    turns: Bool[Array, "T B"]  # the step with which the answer begins


@dataclass(frozen=True)
class Task:
    """One task at one size.

    Attributes:
        draw: makes sequences of a key and a number of rows, up to a length (`length`) or of that one (True).
        channels: I and O.
        loss: of the scores.
        length: of the longest sequences in training, in the task's own count.
        batch: sequences an update.
        optimizer: of the source.
        then: lengths to evaluate.
        repeats: of vectors at most; an end follows where there is more than one.
    """

    draw: Callable[[Array, int, int, bool], Batch]
    channels: tuple[int, int]
    loss: Literal["bits", "squares", "classes", "symbols"]
    length: int
    batch: int
    optimizer: optax.GradientTransformation
    then: tuple[int, ...]
    repeats: int = 1

    @property
    def unit(self) -> str:
        """The unit of `wrong`."""
        units = {"bits": "bits wrong", "squares": "squared error", "classes": "nats a step"}
        return {**units, "symbols": "symbols wrong"}[self.loss]

    def losses(self, scores: Float[Array, "T B O"], targets: Float[Array, "T B O"]) -> Float[Array, "T B"]:
        """The loss at each step, the mean over channels of bits and numbers."""
        if self.loss in ("classes", "symbols"):
            return optax.softmax_cross_entropy(scores, targets)
        of = optax.sigmoid_binary_cross_entropy if self.loss == "bits" else optax.losses.squared_error
        return of(scores, targets).mean(axis=-1)

    def wrong(self, scores: Float[Array, "T B O"], batch: Batch) -> Float[Array, "B"]:
        """Bits or symbols wrong in each sequence, or its loss."""
        if self.loss == "symbols":
            said, right = jnp.argmax(scores, axis=-1), jnp.argmax(batch.targets, axis=-1)
            return jnp.sum((said != right) & batch.asked, axis=0)
        if self.loss == "bits":
            return jnp.sum(((scores > 0) != (batch.targets > 0.5)) & batch.asked[..., None], axis=(0, 2))
        return jnp.sum(self.losses(scores, batch.targets), axis=0, where=batch.asked) / jnp.sum(
            batch.asked, axis=0
        )


def copies(bits: int, repeats: int, key: Array, rows: int, longest: int, exactly: bool = False) -> Batch:
    """Vectors of bits, a mark in the last channel, and the vectors again.

    With more than one of ``repeats`` the mark says how often, as a share of the most, and an end follows, in a
    channel of its own.
    """
    of_length, of_bits = jax.random.split(key)
    lengths = jax.random.randint(of_length, (rows,), longest if exactly else 1, longest + 1)
    vectors = jax.random.bernoulli(of_bits, 0.5, (longest, rows, bits)).astype(jnp.float32)
    times = jax.random.randint(jax.random.fold_in(key, 1), (rows,), 1, repeats + 1)
    ends = repeats > 1
    at = jnp.arange(longest * (repeats + 1) + 1 + ends)[:, None]
    told, asked = at < lengths, (at > lengths) & (at <= lengths * (times + 1))
    of = lambda index: jnp.take_along_axis(  # noqa: E731
        vectors, jnp.clip(index, 0, longest - 1)[..., None], axis=0
    )
    turns = at == lengths
    inputs = jnp.concatenate(
        [of(at + 0 * lengths) * told[..., None], (turns * times / repeats)[..., None]], axis=-1
    )
    targets = of((at - lengths - 1) % lengths) * asked[..., None]
    if ends:
        end = at == lengths * (times + 1) + 1
        targets, asked = jnp.concatenate([targets, end[..., None]], axis=-1), asked | end
    return Batch(inputs, targets, asked, turns)


def sums(key: Array, rows: int, length: int, exactly: bool = True) -> Batch:
    """Numbers of which one in either half is marked, and the sum of these two at the last step."""
    of_numbers, of_marks = jax.random.split(key)
    numbers = jax.random.uniform(of_numbers, (length, rows))
    first, second = jax.random.randint(of_marks, (2, rows), 0, length // 2) + jnp.array([[0], [length // 2]])
    at = jnp.arange(length)[:, None]
    marks = (at == first) | (at == second)
    last = jnp.broadcast_to(at == length - 1, (length, rows))
    inputs = jnp.stack([numbers, marks.astype(jnp.float32)], axis=-1)
    return Batch(inputs, (jnp.sum(numbers * marks, axis=0) * last)[..., None], last, last)


def symbols_again(key: Array, rows: int, length: int, exactly: bool = True) -> Batch:
    """10 symbols, ``length`` - 1 blanks, a mark, and 10 steps in which the symbols are asked for, in order."""
    symbols = jax.random.randint(key, (10, rows), 0, SYMBOLS)
    blanks = jnp.full((length + 10, rows), BLANK)
    inputs = jnp.concatenate([symbols, blanks.at[length - 1].set(GO)])
    targets = jnp.concatenate([blanks, symbols])
    turns = jnp.broadcast_to(jnp.arange(length + 20)[:, None] == length + 10, targets.shape)
    one_hot = (jax.nn.one_hot(inputs, 10), jax.nn.one_hot(targets, 9))
    return Batch(*one_hot, jnp.ones(targets.shape, bool), turns)


def pairs(key: Array, rows: int, length: int, exactly: bool = True) -> Batch:
    """Keys with their values, no symbol twice, and then the keys alone, in another order."""
    draw = jax.vmap(lambda key: jax.random.permutation(key, CHOICES)[:length])
    of_keys, of_values, of_order = jax.random.split(key, 3)
    keys, values = (draw(jax.random.split(each, rows)).T for each in (of_keys, of_values))
    order = jax.random.permutation(of_order, length)
    shown = jnp.concatenate([keys, keys[order]])
    told = jnp.concatenate([values, jnp.full((length, rows), CHOICES)])  # none: its one-hot is 0
    inputs = jnp.concatenate([jax.nn.one_hot(shown, CHOICES), jax.nn.one_hot(told, CHOICES)], axis=-1)
    asked = jnp.broadcast_to(jnp.arange(2 * length)[:, None] >= length, shown.shape)
    turns = jnp.broadcast_to(jnp.arange(2 * length)[:, None] == length, shown.shape)
    targets = jax.nn.one_hot(jnp.concatenate([values, values[order]]), CHOICES)
    return Batch(inputs, targets, asked, turns)


_GRAVES = optax.chain(optax.clip(10.0), optax.rmsprop(1e-4, decay=0.95, momentum=0.9))
_DNC = optax.chain(optax.clip_by_global_norm(50.0), optax.rmsprop(1e-4, eps=1e-10))
_FAST = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
TASKS = {
    "copy": Task(partial(copies, 8, 1), (9, 8), "bits", 20, 1, _GRAVES, (10, 20, 40, 80)),
    "repeat_copy": Task(partial(copies, 4, 2), (5, 5), "bits", 2, 16, _DNC, (1, 2), 2),
    "long_repeat_copy": Task(partial(copies, 4, 2), (5, 5), "bits", 8, 32, _ADAM, (4, 8, 12), 2),
    "adding": Task(sums, (2, 1), "squares", 100, 50, _ADAM, (100,)),
    "copy_memory": Task(symbols_again, (10, 9), "classes", 100, 50, _ADAM, (100,)),
    "associative_recall": Task(pairs, (2 * CHOICES, CHOICES), "symbols", 16, 50, _FAST, (8, 16, 32, 64)),
}


class WithoutLink(DNCCell):
    """A DNC that does not know in which order it wrote: it reads by content alone."""

    def access(self, memory: DNCMemory, said: Any) -> DNCMemory:
        """`MemoryCell.access`."""
        memory = super().access(memory, said)
        return memory._replace(link=jnp.zeros_like(memory.link), precedence=jnp.zeros_like(memory.precedence))


@dataclass(frozen=True)
class BankCell(Cell):
    """A network beside a `Bank` of key and value, the two halves of what it reads; y = [h, read].

    A value is written with its key as soon as it is told, and softmax(q · k) of a learned query q = W x reads.
    """

    controller: Cell
    slots: int

    @property
    def width(self) -> int:  # type: ignore[override]
        """Channels of h and of a value."""
        return self.controller.width + CHOICES

    def init(self, key: Array, inputs: int) -> Any:
        """`Cell.init`."""
        of_controller, of_query = jax.random.split(key)
        kernel = jax.nn.initializers.lecun_normal()(of_query, (inputs, CHOICES))
        return {"controller": self.controller.init(of_controller, inputs), "query": {"kernel": kernel}}

    def start(self, rows: int) -> Any:
        """`Cell.start`."""
        return self.controller.start(rows), Bank.empty(rows, self.slots, CHOICES, (CHOICES,))

    def step(self, params: Any, state: Any, inputs: Array) -> tuple[Any, Array]:
        """`Cell.step`."""
        of_controller, bank = state
        own = self.controller.prepared(params["controller"], inputs)
        of_controller, h = self.controller.step(params["controller"], of_controller, own)
        key, value = jnp.split(inputs, 2, axis=-1)
        bank = bank.written(key[:, None], value[:, None], (value.sum(axis=-1) > 0)[:, None])
        read = bank.read(linear(inputs, params["query"]["kernel"]), 1.0)
        return (of_controller, bank), jnp.concatenate([h, read], axis=-1)


def scores(cell: Cell, params: Any, batch: Batch, emptied: bool = False) -> Float[Array, "T B O"]:
    """Scores of all channels at every step; ``emptied``: nothing is known where the answer begins."""
    flow = Flow(jnp.ones_like(batch.asked), batch.turns) if emptied else None
    y, _ = cell.read(params["cell"], batch.inputs, cell.start(batch.asked.shape[1]), flow)
    return linear(y, params["head"]["kernel"], params["head"]["bias"])


@partial(jax.jit, static_argnums=(0, 1, 4), donate_argnums=(2,))
def trained(task: Task, cell: Cell, state: Any, first: Array, count: int, seed: Array):
    """The state after ``count`` more updates, and what was wrong, on average over them."""

    def loss(params: Any, batch: Batch):
        given = scores(cell, params, batch)
        losses = task.losses(given, batch.targets)
        return jnp.mean(losses, where=batch.asked), task.wrong(given, batch).mean()

    def update(state: Any, number: Array):
        params, of_optimizer = state
        key = jax.random.fold_in(jax.random.key(seed), number)
        data = task.draw(key, task.batch, task.length, False)
        grads, wrong = jax.grad(loss, has_aux=True)(params, data)
        updates, of_optimizer = task.optimizer.update(grads, of_optimizer, params)
        return (optax.apply_updates(params, updates), of_optimizer), wrong

    state, wrong = jax.lax.scan(update, state, first + jnp.arange(count))
    return state, wrong.mean()


@partial(jax.jit, static_argnums=(0, 1, 3, 4))
def tested(task: Task, cell: Cell, params: Any, length: int, emptied: bool) -> Array:
    """The share of bits or symbols that is wrong in 200 new sequences of one length, or their loss."""
    batch = task.draw(jax.random.key(length), 200, length, True)
    wrong = task.wrong(scores(cell, params, batch, emptied), batch)
    of_step = {"bits": batch.targets.shape[-1], "symbols": 1}.get(task.loss)
    most = jnp.ones(200) if of_step is None else of_step * batch.asked.sum(axis=0)
    return jnp.sum(wrong) / jnp.sum(most)


def begun(task: Task, cell: Cell, seed: int) -> Any:
    """Random parameters, and the optimizer's state."""
    of_cell, of_head = jax.random.split(jax.random.key(seed))
    inputs, outputs = task.channels
    kernel = jax.nn.initializers.lecun_normal()(of_head, (cell.width, outputs))
    params = {"cell": cell.init(of_cell, inputs), "head": {"kernel": kernel, "bias": jnp.zeros(outputs)}}
    return params, task.optimizer.init(params)


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


def whole_number(text: str, least: int) -> int:
    """A number of the command line.

    Raises:
        UserError: it is none, below ``least``, or too large.
    """
    number = int(text) if text.removeprefix("-").isdecimal() else least - 1
    if not least <= number < 2**31:
        raise UserError(f"numbers must be whole and in [{least}, 2^31), got {text!r}")
    return number


def claimed(folder: Path, started: dict[str, Any]) -> None:
    """Makes a folder that goes on with the same task, network and seed alone.

    Raises:
        UserError: it is a file, cannot be made, or holds another run.
    """
    file = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text()) if file.exists() else started
        if before == started:
            file.write_text(json.dumps(started))
    except (OSError, ValueError) as error:
        raise UserError(f"--folder {folder} cannot be used: {error}") from error
    if before != started:
        raise UserError(f"--folder {folder} holds a run of {before}, got {started}; give another folder")


def without_memory(task: Task, length: int) -> float:
    """The same of the best answer without a memory, which guesses bits and symbols, and knows the end."""
    if task.loss != "bits":
        of_classes = 10 * math.log(SYMBOLS) / (length + 20)
        return {"squares": 1 / 6, "classes": of_classes, "symbols": 1 - 1 / CHOICES}[task.loss]
    ends, outputs = task.repeats > 1, task.channels[1]
    said = [length * times for times in range(1, task.repeats + 1)]  # vectors, as often as each mark tells
    return 0.5 * (outputs - ends) * sum(said) / (outputs * sum(steps + ends for steps in said))


def main(arguments: list[str]) -> None:
    """Trains, prints, evaluates."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="copy")
    parser.add_argument("--cell", choices=CELLS, default="ntm")
    parser.add_argument("--without-link", action="store_true", help="a dnc that reads by content alone")
    count = partial(whole_number, least=1)
    parser.add_argument("--width", type=count, default=100, help="of the network, or of a memory's controller")
    parser.add_argument("--slots", type=count, default=128)
    parser.add_argument("--word-width", type=count, default=20)
    parser.add_argument("--sequences", type=count, default=30_000, help="to learn from in all")
    parser.add_argument("--batch", type=count, help="sequences an update, in place of the task's")
    parser.add_argument("--seed", type=partial(whole_number, least=0), default=0)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    sizes = {"num_slots": given.slots, "word_width": given.word_width} if given.cell in ("ntm", "dnc") else {}
    cell: Any = CELLS[given.cell](width=given.width, **sizes).cell()
    if given.cell == "bank":
        if given.task != "associative_recall":
            parser.error(f"--cell bank needs --task associative_recall, got {given.task}")
        cell, sizes = BankCell(cell, given.slots), {"num_slots": given.slots}
    if given.without_link:
        if given.cell != "dnc":
            parser.error(f"--without-link needs --cell dnc, got {given.cell}")
        cell = WithoutLink(cell.controller, cell.num_slots, cell.word_width, cell.num_reads)
    task = TASKS[given.task]
    task = replace(task, batch=given.batch or task.batch)
    started = {name: getattr(given, name) for name in ("task", "cell", "without_link", "width", "seed")}
    claimed(given.folder, {**started, **sizes, "batch": task.batch})
    state, number = loaded(given.folder / "state.npz", begun(task, cell, given.seed))
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(state[0])):,} parameters", flush=True)
    count, start = max((1000 if task.batch == 1 else 10_000) // task.batch, 1), time.monotonic()
    while (number + count) * task.batch <= given.sequences:
        state, wrong = trained(task, cell, state, jnp.array(number), count, jnp.array(given.seed))
        number += count
        seconds = time.monotonic() - start
        line = f"{number * task.batch:,} sequences  {wrong:.4g} {task.unit}  {seconds:.0f} s"
        print(line, flush=True)
        with open(given.folder / "curve.txt", "a") as file:
            file.write(line + "\n")
        saved(given.folder / "state.npz", state, number)
    for length in task.then:
        knows, emptied = (float(tested(task, cell, state[0], length, empty)) for empty in (False, True))
        unit = f"of the {task.loss} wrong" if task.loss in ("bits", "symbols") else task.unit
        line = f"length {length}: {knows:.4g} {unit}, {emptied:.4g} with the state emptied"
        print(f"{line}, {without_memory(task, length):.4g} without a memory", flush=True)


if __name__ == "__main__":
    run_command(main)
