"""Supervised learning with and without RLOO on task dialogues, at equal tokens, over several seeds.

    python scripts/reproduce_dialogue.py --seeds 0 1

Trains `configs/dialogue/multiwoz.yaml` as it is, and with its tokens given to supervised learning alone: a step
of RLOO (32 rows of up to 160 tokens) counts as two steps of SFT (16 such rows). Prints, for the test split, the
perplexity of the assistant's tokens and F1 of the names, times and numbers of greedy answers, counted over all
answers together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import hybrid_jax as hj
from hybrid_jax.rewards.dialogue import entities

CONFIG = "configs/dialogue/multiwoz.yaml"
ARMS = {  # 250 + 50 steps of SFT, 50 of RLOO; or two more of SFT for each of RLOO
    "sft": ["scheduler={name: alternation, cycle: {sft: 1}}", "steps=400"],
    "sft_rloo": [],
}
KINDS = ("names", "times", "numbers")
ASKED = 512


def f1(kind: str, texts: Sequence[str], references: Sequence[str]) -> float:
    """F1 of the entities of one kind, counted over all rows together."""
    found = [(row, entity) for row, text in enumerate(texts) for entity in entities(text)[kind]]
    wanted = [(row, entity) for row, text in enumerate(references) for entity in entities(text)[kind]]
    return 2 * len({*found} & {*wanted}) / max(len(found) + len(wanted), 1)


def run(arm: str, seed: int, folder: Path) -> dict[str, float]:
    """Trains one arm and returns what its last policy does on the test split."""
    here = folder / f"{arm}_{seed}"
    config = hj.load_config(CONFIG, [f"run_dir={here}", f"seed={seed}", *ARMS[arm]])
    hj.build(config).train()
    records = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    measured = [record for record in records if "evaluation/perplexity" in record][-1]
    policy = hj.load_policy(str(here), ["sampler.temperature=0", "sampler.max_new_tokens=32"])
    examples = [example for example in config.data.load("held_out") if example.response][:ASKED]
    answers = [answer.response for answer in policy.generate(examples)]
    references = [example.response or "" for example in examples]
    scores = {kind: f1(kind, answers, references) for kind in KINDS}
    words = sum(len(answer.split()) for answer in answers) / len(answers)
    return {"perplexity": measured["evaluation/perplexity"], **scores, "words": words}


def main() -> None:
    """Trains both arms with each seed and prints a line for each."""
    parser = argparse.ArgumentParser(description="SFT with and without RLOO on MultiWOZ, at equal tokens.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, default=Path("runs/dialogue"), help="of the runs")
    options = parser.parse_args()
    for seed in options.seeds:
        for arm in ARMS:
            started = time.monotonic()
            found = run(arm, seed, options.folder)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{arm:9} seed {seed}  {shown}  ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
