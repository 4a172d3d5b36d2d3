"""Times an LSTM or a GRU of ours beside Flax's in training and PyTorch's in decoding; prints JSON.

    python scripts/bench_recurrent.py --width 64
    python scripts/bench_recurrent.py --width 512 --cell gru

training   the gradient of Σ y² with respect to parameters and inputs, of 64 rows of 64 tokens: our cell, and
           `flax.linen.RNN` (with OptimizedLSTMCell or GRUCell)
decoding   64 rows sample 64 tokens greedily from a model of 256 tokens: our `step` in one compiled loop, and
           torch.nn.LSTM or GRU with an embedding and a linear head, a call for each token

``ratio`` is the median over turns of the peer's seconds by ours, in this process, one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from bench import Ours, measure_all

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lstm import LSTM

ROWS, TOKENS, VOCABULARY = 64, 64, 256
KEY = jax.random.key(0)


def training(kind: str, width: int) -> dict[str, Callable[[], Any]]:
    """A step of each side."""
    x = jax.random.normal(KEY, (TOKENS, ROWS, width))
    cell = settings(kind, width).cell()
    peer: Any = nn.RNN({"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}[kind](width), time_major=True)
    ours = jax.jit(jax.grad(lambda p, x: jnp.sum(cell.read(p, x, cell.start(ROWS))[0] ** 2), argnums=(0, 1)))
    theirs = jax.jit(jax.grad(lambda p, x: jnp.sum(peer.apply(p, x) ** 2), argnums=(0, 1)))
    own, of_peer = cell.init(KEY, width), peer.init(KEY, x)
    return {"peer": lambda: theirs(of_peer, x), "ours": lambda: ours(own, x)}


def decoding(kind: str, width: int) -> dict[str, Callable[[], Any]]:
    """A step of each side."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = settings(kind, width).build(VOCABULARY)
    params, first = model.init(KEY), jnp.zeros(ROWS, jnp.int32)

    @jax.jit
    def ours(params):
        def one(carry, _):
            scores, cache = model.step(params, *carry)
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            return (token, cache), token

        return jax.lax.scan(one, (first, model.init_cache(ROWS, TOKENS)), None, TOKENS)[1]

    embedding, head = torch.nn.Embedding(VOCABULARY, width), torch.nn.Linear(width, VOCABULARY)
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](width, width)

    @torch.inference_mode()
    def theirs():
        token, state, tokens = torch.zeros(ROWS, dtype=torch.long), None, []
        for _ in range(TOKENS):
            y, state = layer(embedding(token)[None], state)
            token = head(y[0]).argmax(-1)
            tokens.append(token)
        return torch.stack(tokens).numpy()

    return {"peer": theirs, "ours": lambda: ours(params)}


def settings(kind: str, width: int) -> LSTM | GRU:
    return LSTM(width=width) if kind == "lstm" else GRU(width=width, reset="after")


def main(arguments: list[str]) -> None:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_recurrent.py", description=description, epilog=epilog)
    parser.add_argument("--cell", choices=["lstm", "gru"], default="lstm")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)
    for kind, peer, make in (("training", "flax", training), ("decoding", "torch", decoding)):
        sides = {name: Ours(step) for name, step in make(options.cell, options.width).items()}
        numbers = measure_all(sides, options.turns, options.steps)
        found = {"seconds": numbers["ours_seconds"], "peer_seconds": numbers["peer_seconds"]}
        found["ratio"] = numbers["ours_ratio"]
        rounded = {name: float(f"{number:.4g}") for name, number in found.items()}
        print(json.dumps({"kind": kind, "cell": options.cell, "width": options.width, "peer": peer, **rounded}))


if __name__ == "__main__":
    run_command(main)
