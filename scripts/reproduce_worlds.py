"""Learned returns in the two toy worlds against the best there are; the table of docs/results.md.

    python scripts/reproduce_worlds.py --output runs/worlds

Trains `configs/worlds` by PPO and by RLOO, and by PPO with a policy that has no history: one layer of attention
over three tokens, which sees the last reply alone, and its place in the conversation. The number of a run is
the mean return of its last evaluation: 256 conversations, sampled as in training, with seeds that training
never had. Runs that are there are only read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from hybrid_jax.environments.booking import Booking
from hybrid_jax.environments.twenty_questions import TwentyQuestions

WORLDS = {"twenty_questions": TwentyQuestions(), "booking": Booking()}
METHODS = {"ppo": "ppo", "rloo": "rloo", "no history": "ppo"}  # and the config that each stands on
NO_HISTORY = ["model.num_layers=1", "model.window=3"]


def final_return(world: str, method: str, seed: int, output: Path) -> float:
    """The return of the last evaluation of a run, which is trained first if it is not there."""
    run_dir = output / f"{world}_{method.replace(' ', '_')}_{seed}"
    if not (run_dir / "report.html").is_file():
        config = f"configs/worlds/{world}_{METHODS[method]}.yaml"
        settings = [f"run_dir={run_dir}", f"seed={seed}", *(NO_HISTORY if method == "no history" else [])]
        subprocess.run([sys.executable, "-m", "hybrid_jax.train", "--config", config, *settings], check=True)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    name = f"evaluation/{METHODS[method]}/return"
    return [record[name] for record in records if name in record][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Learned returns in the two toy worlds.")
    parser.add_argument("--output", type=Path, default=Path("runs/worlds"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    seeds = " | ".join(f"seed {seed}" for seed in options.seeds)
    print(f"| world | method | {seeds} | mean | best there is | share |")
    print("|---" * (5 + len(options.seeds)) + "|")
    for world, settings in WORLDS.items():
        for method in METHODS:
            returns = [final_return(world, method, seed, options.output) for seed in options.seeds]
            blind = method == "no history"
            best = settings.best_without_history() if blind else settings.optimal_return()
            shown = [f"{number:.3f}" for number in (*returns, statistics.mean(returns), best)]
            print(
                f"| {world} | {method} | {' | '.join(shown)} | {statistics.mean(returns) / best:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
