"""Hybrid training against examples alone with the same tokens, over seeds; the table of docs/results.md.

    python scripts/reproduce_hybrid.py --config configs/quickstart.yaml --output runs/reproduce_quickstart

A token is counted each time an update reads it, so a PPO step counts rows × columns × epochs. The run on
examples alone gets as many tokens as the hybrid one, all of them SFT. Runs that are there are only read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.scheduler import planned_steps

SHOWN = {"score": "score", "bleu": "BLEU", "loss": "held-out loss", "eos_fraction": "ended"}


def sft_only_steps(config_path: str, overrides: list[str]) -> int:
    """The number of SFT steps that read as many tokens as the hybrid run."""
    config = load_config(config_path, overrides)
    phases = build(config).phases
    steps = {name: count or 0 for name, count in planned_steps(config.scheduler, config.steps).items()}
    ppo = config.phases["ppo"]
    columns = (
        phases["ppo"].rollouts.prompts.batch(0, ppo.prompts_per_step).tokens.shape[1]
        + ppo.sampler.max_new_tokens
    )
    ppo_tokens = steps["ppo"] * ppo.rows * columns * ppo.epochs
    sft = config.phases["sft"]
    return steps["sft"] + round(ppo_tokens / (sft.batch_size * sft.length))


def train(config_path: str, run_dir: Path, overrides: list[str]) -> dict[str, float]:
    """The last evaluation of a run, which is trained first if it is not there."""
    if not (run_dir / "report.html").is_file():
        command = [
            sys.executable,
            "-m",
            "hybrid_jax.train",
            "--config",
            config_path,
            f"run_dir={run_dir}",
            *overrides,
        ]
        subprocess.run(command, check=True)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["phase"] == "evaluation"][-1]
    numbers = {name: last[f"evaluation/{name}"] for name in SHOWN}
    kls = [record["ppo/kl"] for record in records if record["phase"] == "ppo"]
    return {**numbers, "kl": kls[-1] if kls else float("nan"), "seconds": last["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    options = parser.parse_args()
    budget = sft_only_steps(options.config, [*options.overrides, f"run_dir={options.output}/plan"])
    alone = [f"steps={budget}", "scheduler.cycle.ppo=0"]
    rows: dict[str, list[dict[str, float]]] = {"hybrid": [], f"SFT only, {budget} steps": []}
    for seed in options.seeds:
        for arm, extra in zip(rows, ([], alone), strict=True):
            run_dir = options.output / f"{arm.split(',')[0].replace(' ', '_').lower()}_seed_{seed}"
            rows[arm].append(train(options.config, run_dir, [*options.overrides, f"seed={seed}", *extra]))
    columns = {**SHOWN, "kl": "KL, nats a response", "seconds": "seconds"}
    print("| | " + " | ".join(columns.values()) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for arm, runs in rows.items():
        for seed, numbers in zip(options.seeds, runs, strict=True):
            print(f"| {arm}, seed {seed} | " + " | ".join(f"{numbers[c]:.3f}" for c in columns) + " |")
        means = (statistics.mean(run[c] for run in runs) for c in columns)
        print(f"| **{arm}, mean** | " + " | ".join(f"**{mean:.3f}**" for mean in means) + " |")


if __name__ == "__main__":
    main()
