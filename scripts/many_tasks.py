"""Twenty small tasks in turn: what the bank keeps of earlier ones is known in later ones.

    python scripts/many_tasks.py --seed 0

An LSTM beside a bank learns associative recall (memory_tasks.py), and then nothing more. A world has 64 facts,
a symbol for each of 64. A task asks for 8 of them, drawn anew, and only then tells them: what is answered right
was told in an earlier task. Between two tasks the bank is kept, cleared, or shuffled, so that keys find values
of others. Of what task t asks for 1 − (7/8)^(t − 1) was told before, on average; guesses are right in 1/64.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from memory_tasks import CHOICES, TASKS, BankCell, begun, trained, whole_number

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.models.layers import linear
from hybrid_jax.models.memory.bank import Bank
from hybrid_jax.models.recurrent.lstm import LSTMCell

TASKS_IN_TURN, FACTS, WORLDS, WIDTH = 20, 8, 500, 32
Between = Literal["kept", "cleared", "shuffled"]


def asked_then_told(values: Int[Array, "B K"], keys: Int[Array, "B F"]) -> Float[Array, "2F B 2K"]:
    """One task as a network reads it: keys alone, then the same ones with their values."""
    one_hot = jax.nn.one_hot(keys.T, CHOICES)
    of_keys = jax.nn.one_hot(jnp.take_along_axis(values, keys, axis=1).T, CHOICES)
    asks = jnp.concatenate([one_hot, jnp.zeros_like(of_keys)], axis=-1)
    return jnp.concatenate([asks, jnp.concatenate([one_hot, of_keys], axis=-1)])


def shuffled(bank: Bank, key: Array) -> Bank:
    """The bank with the values of the slots that hold something in another order, each row in its own."""
    random = jnp.where(bank.used >= 0, jax.random.uniform(key, bank.used.shape), 2.0)
    return bank.replace(values=jnp.take_along_axis(bank.values, jnp.argsort(random)[..., None], axis=1))


@partial(jax.jit, static_argnums=(0, 3))
def in_turn(
    cell: BankCell, params: Any, key: Array, between: Between
) -> tuple[Float[Array, "tasks"], Float[Array, "tasks"]]:
    """The share of answers that is right in each task, and the share that was told in an earlier one."""
    of_values, of_tasks = jax.random.split(key)
    values = jax.vmap(lambda key: jax.random.permutation(key, CHOICES))(jax.random.split(of_values, WORLDS))

    def one(state: tuple[Bank, Bool[Array, "B K"]], key: Array):
        bank, known = state
        of_keys, of_order = jax.random.split(key)
        draw = lambda key: jax.random.choice(key, CHOICES, (FACTS,), replace=False)  # noqa: E731
        keys = jax.vmap(draw)(jax.random.split(of_keys, WORLDS))
        controller, empty = cell.start(WORLDS)
        bank = {"kept": bank, "cleared": empty, "shuffled": shuffled(bank, of_order)}[between]
        y, (_, bank) = cell.read(params["cell"], asked_then_told(values, keys), (controller, bank))
        said = jnp.argmax(linear(y[:FACTS], **params["head"]), axis=-1).T
        right = said == jnp.take_along_axis(values, keys, axis=1)
        told = jnp.take_along_axis(known, keys, axis=1)
        known = known.at[jnp.arange(WORLDS)[:, None], keys].set(True)
        return (bank, known), (right.mean(), told.mean())

    start = (cell.start(WORLDS)[1], jnp.zeros((WORLDS, CHOICES), bool))
    return jax.lax.scan(one, start, jax.random.split(of_tasks, TASKS_IN_TURN))[1]


def main(arguments: list[str]) -> None:
    """Prints a line for each task."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sequences", type=partial(whole_number, least=50), default=20_000, help="to learn from"
    )
    parser.add_argument("--seed", type=partial(whole_number, least=0), default=0)
    given = parser.parse_args(arguments)
    task, controller = TASKS["associative_recall"], LSTMCell(WIDTH, WIDTH)
    cell = BankCell(controller, task.length)
    state, wrong = begun(task, cell, given.seed), 0.0
    updates = given.sequences // task.batch
    for first in range(0, updates, 200):
        count = min(200, updates - first)
        state, wrong = trained(task, cell, state, jnp.array(first), count, jnp.array(given.seed))
    print(f"{wrong:.4g} of {task.length} symbols wrong at the end of learning", flush=True)
    room = BankCell(controller, TASKS_IN_TURN * FACTS)  # for all that is told; slots have no parameters
    ways: tuple[Between, ...] = ("kept", "cleared", "shuffled")
    found = [in_turn(room, state[0], jax.random.key(given.seed), way) for way in ways]
    print(f"| task | told before | {' | '.join(ways)} |\n|---|---|---|---|---|")
    for task in range(TASKS_IN_TURN):
        shares = [found[0][1][task], *(right[task] for right, _ in found)]
        print(f"| {task + 1} | {' | '.join(f'{float(share):.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    run_command(main)
