"""The gain of slot refill where responses differ in length, on GPT-2 shapes; prints one JSON line.

    python scripts/bench_slots.py --size mini
    python scripts/bench_slots.py --size mini --slots 32 --mean-length 8 --max-length 128

The model gives the end the same probability at every token, so lengths are geometric (and cut at the longest);
weights are random. Three ways take turns over the same number of prompts:

    slots     refilled: a row that has ended takes the next prompt
    batches   as many rows at once, each batch until its longest response has ended
    whole     all prompts at once: the cache is that many times larger

``ratio`` and ``whole_ratio`` are medians over turns of the seconds of the latter two by those of the first.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench import STEPS, Ours
from bench_work import SHAPES, Step, Work, work_of

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import environment
from hybrid_jax.sampling.ancestral import Ancestral


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    work = work_of("rollout", options.size)
    rows = options.slots * options.prompts_per_slot
    steps = ways(work, options.slots, rows, options.mean_length, options.max_length)
    numbers = measure(steps, options.turns, options.steps or STEPS[options.size])
    here = environment()
    settings = {name: getattr(options, name) for name in ("size", "slots", "mean_length", "max_length")}
    rounded = {name: float(f"{number:.4g}") for name, number in numbers.items()}
    device = f"{here['devices'][0]}, {here['cpu_count']} cores"
    print(json.dumps({**settings, "prompts": rows, **rounded, "device": device, "commit": here["commit"]}))


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_slots.py", description=description, epilog=epilog)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompts-per-slot", type=int, default=16)
    parser.add_argument("--mean-length", type=int, default=16, help="of a response, in tokens")
    parser.add_argument("--max-length", type=int, default=64, help="of a response, in tokens")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, help="timed ones a turn; by default fewer for the larger sizes")
    options = parser.parse_args(arguments)
    for name, number in vars(options).items():
        if isinstance(number, int) and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    return options


def ways(work: Work, slots: int, rows: int, mean_length: int, max_length: int) -> dict[str, Step]:
    """A rollout of all prompts, in each of the three ways."""
    model = replace(work.decoder(), head_bias=True).build(work.vocab_size)
    params = model.init(jax.random.key(0))
    bias = params["lm_head"]["bias"].at[0].set(np.log(work.vocab_size / mean_length))
    params = {**params, "lm_head": {**params["lm_head"], "bias": bias}}
    prompts = jax.random.randint(jax.random.key(1), (rows, work.length), 1, work.vocab_size)
    mask, keys = jnp.ones(prompts.shape, bool), iter(range(sys.maxsize))

    def sample(part: slice, slots: int | None = None):
        sampler = Ancestral(max_length, slots=slots)
        return sampler(model, params, prompts[part], mask[part], jax.random.key(next(keys)), eos_ids=(0,))

    return {
        "slots": lambda: sample(slice(None), slots),
        "batches": lambda: [sample(slice(start, start + slots)) for start in range(0, rows, slots)],
        "whole": lambda: sample(slice(None)),
    }


def measure(steps: dict[str, Step], turns: int, steps_a_turn: int) -> dict[str, float]:
    sides = {name: Ours(step) for name, step in steps.items()}
    for side in sides.values():
        side.turn(1)  # compile
    seconds = [
        {name: statistics.median(side.turn(1 + steps_a_turn)[1:]) for name, side in sides.items()}
        for _ in range(turns)
    ]
    return {
        "seconds": statistics.median(turn["slots"] for turn in seconds),
        "ratio": statistics.median(turn["batches"] / turn["slots"] for turn in seconds),
        "whole_ratio": statistics.median(turn["whole"] / turn["slots"] for turn in seconds),
    }


if __name__ == "__main__":
    run_command(main)
