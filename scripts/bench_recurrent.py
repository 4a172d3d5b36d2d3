"""Times recurrent layers: an LSTM or a GRU beside Flax's and PyTorch's, chunks beside a scan; prints JSON.

    python scripts/bench_recurrent.py --width 64
    python scripts/bench_recurrent.py --width 512 --cell gru
    python scripts/bench_recurrent.py --width 256 --cell mamba2

Of an LSTM and a GRU:

training   the gradient of Σ y² with respect to parameters and inputs, of 64 rows of 64 tokens: our cell, and
           `flax.linen.RNN` (with OptimizedLSTMCell or GRUCell)
decoding   64 rows sample 64 tokens greedily from a model of 256 tokens: our `step` in one compiled loop, and
           torch.nn.LSTM or GRU with an embedding and a linear head, a call for each token

Of a Mamba-2 and a gated DeltaNet:

training   the same gradient of 2 rows of 1024 tokens of a layer: in chunks, and token by token in one scan
decoding   the same loop of a model of one layer: behind 32 768 tokens, and behind one (ratio 1 is flat)

``ratio`` is the median over turns of the peer's seconds by ours, in this process, one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from bench import Ours, measure_all

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.models.recurrent.cell import Cell
from hybrid_jax.models.recurrent.gated_deltanet import GatedDeltaNet
from hybrid_jax.models.recurrent.gru import GRU
from hybrid_jax.models.recurrent.lstm import LSTM
from hybrid_jax.models.recurrent.mamba2 import Mamba2
from hybrid_jax.models.recurrent.model import RecurrentModel

ROWS, TOKENS, VOCABULARY = 64, 64, 256
LONG_ROWS, LONG, CONTEXT = 2, 1024, 32768  # of the layers that are read in chunks
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
    params, cache = model.init(KEY), model.init_cache(ROWS, TOKENS)

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

    return {"peer": theirs, "ours": lambda: _decoded(model, params, cache)}


@partial(jax.jit, static_argnums=0)
def _decoded(model: RecurrentModel, params: Any, cache: Any) -> Any:
    """Tokens that go on behind the cache, greedily."""

    def one(carry, _):
        scores, cache = model.step(params, *carry)
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return (token, cache), token

    first = jnp.zeros(len(jax.tree.leaves(cache)[0]), jnp.int32)
    return jax.lax.scan(one, (first, cache), None, TOKENS)[1]


def chunks(kind: str, width: int) -> dict[str, Callable[[], Any]]:
    """A step of training in chunks, and token by token."""
    cell = CHUNKED[kind](width=width).cell()
    x, params = jax.random.normal(KEY, (LONG, LONG_ROWS, width)), cell.init(KEY, width)

    def side(read: Any) -> Callable[[], Any]:
        loss = lambda p, x: jnp.sum(read(cell, p, x, cell.start(LONG_ROWS))[0] ** 2)  # noqa: E731
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return lambda: step(params, x)

    return {"peer": side(Cell.read), "ours": side(type(cell).read)}


def contexts(kind: str, width: int) -> dict[str, Callable[[], Any]]:
    """Decoding behind one token, and behind many."""
    model = CHUNKED[kind](width=width).build(VOCABULARY)
    params, prefill = model.init(KEY), jax.jit(model.prefill)

    def side(length: int) -> Callable[[], Any]:
        tokens = jax.random.randint(KEY, (LONG_ROWS, length), 0, VOCABULARY)
        cache = prefill(params, tokens, tokens >= 0, model.init_cache(LONG_ROWS, length + TOKENS))[1]
        return lambda: _decoded(model, params, cache)

    return {"peer": side(1), "ours": side(CONTEXT)}


CHUNKED: dict[str, Any] = {"mamba2": Mamba2, "gated_deltanet": GatedDeltaNet}


def settings(kind: str, width: int) -> LSTM | GRU:
    return LSTM(width=width) if kind == "lstm" else GRU(width=width, reset="after")


def main(arguments: list[str]) -> None:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_recurrent.py", description=description, epilog=epilog)
    parser.add_argument("--cell", choices=["lstm", "gru", *CHUNKED], default="lstm")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(arguments)
    benches = (("training", "flax", training), ("decoding", "torch", decoding))
    if options.cell in CHUNKED:
        benches = (("training", "scan", chunks), ("decoding", "behind one token", contexts))
    for kind, peer, make in benches:
        sides = {name: Ours(step) for name, step in make(options.cell, options.width).items()}
        numbers = measure_all(sides, options.turns, options.steps)
        found = {"seconds": numbers["ours_seconds"], "peer_seconds": numbers["peer_seconds"]}
        found["ratio"] = numbers["ours_ratio"]
        rounded = {name: float(f"{number:.4g}") for name, number in found.items()}
        print(json.dumps({"kind": kind, "cell": options.cell, "width": options.width, "peer": peer, **rounded}))


if __name__ == "__main__":
    run_command(main)
