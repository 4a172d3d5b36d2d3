"""Praise by reward: a hybrid run on sentences of film reviews, and what judges that it never saw say of it.

    python scripts/reproduce_sentiment.py --data ../shared/data/imdb_full

Writes the sentences, trains the classifier (configs/classifiers/imdb_sentiment.yaml), the language model and
the hybrid run (configs/sentiment), each unless it is there, and prints how score, judge and perplexity moved.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DATA = Path("runs/sentiment/data")
JUDGE = 'evaluation.judges={{nbsvm: {{name: "sentiment_judge:NaiveBayesSvm", train: "{}"}}}}'
PROMPT_WORDS, SHORTEST, LONGEST = 5, 10, 28  # words
PROMPT_LETTERS = 40  # at most, so that no prompt of rare words fills the context
RUNS = {
    "runs/imdb_sentiment": "configs/classifiers/imdb_sentiment.yaml",
    "runs/sentiment/language_model": "configs/sentiment/language_model.yaml",
    "runs/sentiment/hybrid": "configs/sentiment/hybrid.yaml",
}


def sentences(path: Path) -> Iterator[list[str]]:
    """Words of the sentences of all reviews that are neither short nor long."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = re.sub(r"(<br />)+|\s+", " ", json.loads(line)["text"])
            for sentence in re.split(r"(?<=[.!?]) +", text):
                words = sentence.split()
                short = sum(map(len, words[:PROMPT_WORDS])) <= PROMPT_LETTERS
                if short and SHORTEST <= len(words) <= LONGEST and words[-1][-1] in ".!?":
                    yield words


def write_data(source: Path, count: int, held_out: int) -> None:
    """Prompts are the first words of a sentence, completions the rest."""
    DATA.mkdir(parents=True, exist_ok=True)
    for name, split, limit in (("train", "train", count), ("held_out", "test", held_out)):
        every = {"train": 2, "held_out": 97}[name]  # some of each film
        chosen = [words for i, words in enumerate(sentences(source / f"{split}.jsonl.gz")) if i % every == 0]
        rows = [
            {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}
            for words in chosen[:limit]
        ]
        (DATA / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if name == "train":
            text = "\n".join(row["completion"].strip() for row in rows)
            (DATA / "train.txt").write_text(text + "\n", encoding="utf-8")


def train(run_dir: str, config: str, overrides: list[str]) -> None:
    if (Path(run_dir) / "report.html").is_file():
        return
    command = [sys.executable, "-m", "hybrid_jax.train", "--config", config, f"run_dir={run_dir}", *overrides]
    judges = {**os.environ, "PYTHONPATH": os.pathsep.join(["scripts", os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, check=True, env=judges)


def table(run_dir: str) -> str:
    """Score, judge and perplexity under the language model, at the start and at the end."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if record["phase"] == "evaluation"]
    kl = [record["ppo/kl"] for record in records if record["phase"] == "ppo"]
    rows = {
        "sentiment (probability, trained on)": lambda r: r["evaluation/reward/sentiment"],
        "positive to NB-SVM (held out)": lambda r: r["evaluation/judge/nbsvm"],
        "perplexity under the language model": lambda r: math.exp(-r["evaluation/judge/reference_log_prob"]),
        "fluency (nats a word)": lambda r: r["evaluation/reward/fluency"],
        "words off the length": lambda r: r["evaluation/reward/length"],
        "distinct-2": lambda r: r["evaluation/distinct_2"],
        "held-out loss": lambda r: r["evaluation/loss"],
    }
    lines = [f"{name:40} {of(evaluations[0]):9.3f} {of(evaluations[-1]):9.3f}" for name, of in rows.items()]
    return "\n".join(
        [f"{'':40} {'start':>9} {'end':>9}", *lines, f"{'KL at the end, nats':40} {'':9} {kl[-1]:9.3f}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/imdb_full"))
    parser.add_argument("--sentences", type=int, default=60_000)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if not (DATA / "train.txt").is_file():
        write_data(options.data, options.sentences, options.held_out)
    for run_dir, config in RUNS.items():
        if "hybrid" not in run_dir:
            train(run_dir, config, [])
    for seed in options.seeds:
        run_dir = f"runs/sentiment/hybrid_{seed}"
        judge = JUDGE.format(options.data / "test.jsonl.gz")  # none of it is in the training data
        train(run_dir, RUNS["runs/sentiment/hybrid"], [f"seed={seed}", judge])
        print(f"{run_dir}\n{table(run_dir)}\n")


if __name__ == "__main__":
    main()
