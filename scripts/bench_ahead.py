"""The gain of answering prompts ahead of the update where rewards take their time; prints one JSON line.

    python scripts/bench_ahead.py --size mini --reward-seconds 0.5

PPO steps of `bench.py` (shared value network) whose reward waits on the host, as for a judge on the network.
Steps in order, and steps with ``rollout_ahead``, take turns; a turn is timed as a whole, since steps
ahead overlap. ``ratio`` is the median over turns of the seconds in order by those ahead.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from bench_work import SHAPES, Step, experiment_step, ppo, work_of

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import environment
from hybrid_jax.rewards.composite import CompositeReward, Part


@dataclass(frozen=True)
class Waiting:
    """A reward that keeps the host waiting, and no processor busy."""

    seconds: float

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        time.sleep(self.seconds)
        return [float(len(response)) for response in responses]


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    numbers = measure(options.size, options.reward_seconds, options.turns, options.steps)
    here = environment()
    rounded = {name: float(f"{number:.4g}") for name, number in numbers.items()}
    settings = {"size": options.size, "reward_seconds": options.reward_seconds}
    device = f"{here['devices'][0]}, {here['cpu_count']} cores"
    print(json.dumps({**settings, **rounded, "device": device, "commit": here["commit"]}))


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_ahead.py", description=description, epilog=epilog)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--reward-seconds", type=float, default=0.1, help="that a reward of one step takes")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="a turn")
    options = parser.parse_args(arguments)
    for name in ("turns", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def measure(size: str, reward_seconds: float, turns: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, in order and ahead, and the ratio."""
    work = work_of("ppo", size)
    reward = CompositeReward({"waiting": Part(Waiting(reward_seconds))})
    settings = replace(ppo(work, "shared"), reward=reward)
    sides = [experiment_step(work, replace(settings, rollout_ahead=ahead)) for ahead in (False, True)]
    for step in sides:
        turn(step, 2)  # compile
    seconds = [[turn(step, steps) for step in sides] for _ in range(turns)]
    return {
        "in_order_seconds": statistics.median(order for order, _ in seconds),
        "ahead_seconds": statistics.median(ahead for _, ahead in seconds),
        "ratio": statistics.median(order / ahead for order, ahead in seconds),
    }


def turn(step: Step, steps: int) -> float:
    """Seconds of each of so many steps, the last of them finished."""
    started = time.perf_counter()
    for _ in range(steps - 1):
        step()
    jax.block_until_ready(step())
    return (time.perf_counter() - started) / steps


if __name__ == "__main__":
    run_command(main)
