"""Supervised learning with and without RLOO in TextWorld games, at equal FLOPs; the table of docs/results.md.

    python scripts/reproduce_textworld.py --seeds 0 1 2 --folder runs/textworld          needs the extra `envs`

Trains `configs/textworld`: SFT on the walkthroughs of 256 games, or fewer steps, then RLOO in 256 other
games without walkthroughs. Every policy plays 128 games that no training had, sampled four times and greedily
once, and 128 games of the walkthroughs. What is there already is only measured again.

FLOPs are counted as 6 for each parameter and token that is learned, and 2 for each that is read or sampled, of
rows as they are padded: a step of SFT has 16 rows of 192 tokens, one of RLOO samples and learns 64 rows of 320.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

import hybrid_jax as hj
from hybrid_jax.dialogue.converse import Converser, Opening
from hybrid_jax.environments.textworld import TextWorld
from hybrid_jax.runs.policy import Policy
from hybrid_jax.sampling.rules import TokenRules
from hybrid_jax.sampling.turns import TurnEngine

SFT_STEP, RLOO_STEP = 6 * 16 * 192, (6 + 2) * 64 * 320  # FLOPs for each parameter
ARMS = {"sft": (1489, 0), "sft_rloo": (600, 100)}  # steps of SFT and of RLOO
TESTED, LEARNED = range(256, 384), range(128)  # games


def won(policy: Policy, config: hj.ExperimentConfig, games: range, temperature: float, times: int) -> float:
    """The share of games that are won."""
    phase = config.phases["rloo"]
    talk, sampler = phase.conversation, phase.sampler
    world = TextWorld(
        **{**vars(phase.environment), "first_game": games.start, "num_games": len(games)},
    )
    engine = TurnEngine(
        policy.model, policy.eos_ids, sampler.max_new_tokens, talk.max_tokens, TokenRules(temperature)
    )
    converser = Converser(engine, world, talk, policy.tokenizer, phase.max_prompt_length, slots=32)
    openings = [Opening(number, {}) for number in range(len(games))] * times
    talks = converser.converse(policy.params, jax.random.key(0), openings)
    return float(np.mean([talk.reward for talk in talks.conversations]))


def main() -> None:
    """Trains each arm with each seed and prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/textworld"), help="of the runs")
    options = parser.parse_args()
    print("| SFT | RLOO | FLOPs / (parameter × 10⁶) | seed | new games sampled | greedy | learned games |")
    print("|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        for arm, (sft, rloo) in ARMS.items():
            here = options.folder / f"{arm}_{seed}"
            if not (here / "report.html").is_file():
                settings = [f"run_dir={here}", f"seed={seed}"]
                hj.build(hj.load_config(f"configs/textworld/{arm}.yaml", settings)).train()
            policy = hj.load_policy(str(here))
            play = hj.load_config("configs/textworld/sft_rloo.yaml")
            sampled, greedy = won(policy, play, TESTED, 1.0, 4), won(policy, play, TESTED, 0.0, 1)
            learned = won(policy, play, LEARNED, 0.0, 1)
            flops = (sft * SFT_STEP + rloo * RLOO_STEP) / 1e6
            shown = " | ".join(f"{share:.1%}" for share in (sampled, greedy, learned))
            print(f"| {sft} | {rloo} | {flops:.1f} | {seed} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
