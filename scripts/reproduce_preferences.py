"""Five methods, one judge to learn from and another that only measures: reward against KL on film reviews.

    python scripts/reproduce_preferences.py --data ../shared/data/imdb_full
    python scripts/draw_frontier.py runs/preferences/results.json docs/preferences_frontier.png

Trains the language model of reproduce_sentiment.py, samples pairs of answers from it and labels them by judge
A, NB-SVM on one half of the test reviews. Every method then learns from A with three strengths and two seeds,
and is measured on the same held-out prompts by A and by judge B, NB-SVM on the other half. Prints a table. What
is there is only read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reproduce_sentiment import DATA, RUNS, train, write_data
from sentiment_judge import NaiveBayesSvm

import hybrid_jax as hj
from hybrid_jax.metrics.text import distinct_n
from hybrid_jax.runs.policy import load_pretrained_policy
from hybrid_jax.sampling.responses import decode_responses, ended

HERE = Path("runs/preferences")
LANGUAGE_MODEL = "runs/sentiment/language_model"
PAIRS = HERE / "pairs.jsonl"
MOST_PROMPT, MOST_NEW = 10, 30  # tokens
SCALE = 20.0  # of a judge's margin, whose standard deviation over answers of the start is 0.05

# The same for every method: 800 prompts, 50 updates of 32 answers, 1,600 answers in all, each read once, and
# this optimizer. All other settings are the defaults of the method.
PROMPTS, UPDATES, ANSWERS, MINIBATCHES = 800, 50, 32, 2
OPTIMIZER = {"name": "adamw", "learning_rate": 5e-4, "weight_decay": 0.0, "schedule": {"name": "linear"}}
OFFLINE = {"name": "preference", "length": MOST_PROMPT + MOST_NEW, "optimizer": OPTIMIZER}
SAMPLED = {
    "sampler": {"name": "ancestral", "max_new_tokens": MOST_NEW},
    "max_prompt_length": MOST_PROMPT,
    "epochs": 1,
    "minibatches": MINIBATCHES,
    "optimizer": OPTIMIZER,
}


def in_groups_of(samples: int) -> dict[str, int]:
    return {"prompts_per_step": MINIBATCHES * ANSWERS // samples, "samples_per_prompt": samples}


def dpo(beta: float) -> dict[str, Any]:
    return {**OFFLINE, "batch_size": ANSWERS // 2, "loss": {"name": "sigmoid", "beta": beta}}


def kto(beta: float) -> dict[str, Any]:
    return {**OFFLINE, "batch_size": ANSWERS, "loss": {"name": "kto", "beta": beta}}


def online_dpo(beta: float) -> dict[str, Any]:
    return {
        "name": "online_preference",
        **SAMPLED,
        **in_groups_of(2),
        "loss": {"name": "sigmoid", "beta": beta},
    }


def ppo(coef: float) -> dict[str, Any]:
    return {"name": "ppo", **SAMPLED, **in_groups_of(1), "kl_control": {"name": "fixed", "coef": coef}}


def rloo(coef: float) -> dict[str, Any]:
    return {"name": "rloo", **SAMPLED, **in_groups_of(4), "kl_control": {"name": "fixed", "coef": coef}}


METHODS = {  # settings of the phase, and how strongly it is held to the start
    "DPO": (dpo, (0.3, 0.1, 0.03)),
    "KTO": (kto, (0.3, 0.1, 0.03)),
    "online DPO": (online_dpo, (0.3, 0.1, 0.03)),
    "PPO": (ppo, (1.0, 0.3, 0.1)),
    "RLOO": (rloo, (1.0, 0.3, 0.1)),
}


def judge(data: Path, half: str) -> dict[str, str]:
    """NB-SVM on a half of the test reviews, of which no sentence is learned; its margin is the score."""
    file = str(data / "test.jsonl.gz")
    return {"name": "sentiment_judge:NaiveBayesSvm", "train": file, "half": half, "output": "decision"}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def short(prompts: Sequence[str], policy: hj.Policy) -> list[str]:
    """Those that leave room for an answer, each once."""
    return [text for text in dict.fromkeys(prompts) if len(policy.tokenizer.encode(text)) <= MOST_PROMPT]


def write_pairs(start: hj.Policy, score: NaiveBayesSvm) -> None:
    """Two answers to each prompt, the one with the higher score chosen.

    A pair of which an answer did not end is left out: the end token behind it would be no token of the policy.
    """
    prompts = short([row["prompt"] for row in rows_of(DATA / "train.jsonl")], start)
    asked = [prompts[i] for i in np.random.default_rng(0).permutation(len(prompts))[: 2 * PROMPTS]]
    answers = start.generate(asked, num_samples=2)
    scores = score([a.prompt for a in answers], [a.response for a in answers])
    pairs = []
    for i in range(0, len(answers), 2):
        better, worse = (i, i + 1) if scores[i] > scores[i + 1] else (i + 1, i)
        if answers[i].complete and answers[i + 1].complete and scores[better] > scores[worse]:
            texts = {"chosen": answers[better].response, "rejected": answers[worse].response}
            pairs.append({"prompt": answers[i].prompt, **texts})
    assert len(pairs) >= PROMPTS, f"of {len(asked)} pairs only {len(pairs)} can be learned from"
    PAIRS.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:PROMPTS]), encoding="utf-8")


def learn(method: str, strength: float, seed: int, reward: Mapping[str, str]) -> hj.Policy:
    """The policy of one run, which is trained first, or goes on."""
    settings, name = METHODS[method][0](strength), method.lower().replace(" ", "_")
    if "sampler" in settings:
        settings["reward"] = {"parts": {"judge": {"reward": reward, "weight": SCALE}}}
    run_dir = folder(method, strength, seed)
    config = {
        "run_dir": str(run_dir),
        "steps": UPDATES // settings.get("minibatches", 1),
        "seed": seed,
        "model": {"name": "pretrained", "path": start_folder()},
        "tokenizer": {"name": "huggingface", "path": start_folder()},
        # Nothing is measured on held-out rows here, but a run must have some.
        "data": {
            "name": "preferences",
            "source": {"name": "jsonl", "train": str(PAIRS), "held_out": str(PAIRS)},
        },
        "phases": {name: settings},
        "scheduler": {"name": "alternation", "cycle": {name: 1}},
        "evaluation": {"num_prompts": 0, "num_examples": 0},
    }
    file = run_dir.with_suffix(".yaml")  # which `python -m hybrid_jax.train --config` reads, too
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML
    trainer = hj.HybridTrainer(file)
    trainer.train()
    return trainer.policy


def start_folder() -> str:
    return str(max(Path(LANGUAGE_MODEL, "exports").iterdir()))


def folder(method: str, strength: float, seed: int) -> Path:
    return HERE / f"{method.lower().replace(' ', '_')}_{str(strength).replace('.', '_')}_seed_{seed}"


def measure(policy: hj.Policy, start: hj.Policy, judges: Mapping[str, NaiveBayesSvm]) -> dict[str, float]:
    """Two answers to every held-out prompt: the judges, the KL to the start in nats a response, lengths."""
    prompts = 2 * held_out_prompts(start)
    stream = hj.PromptStream([hj.Example(text) for text in prompts], policy.tokenizer, MOST_PROMPT)
    responses: list[str] = []
    found: dict[str, list[float]] = {"kl": [], "tokens": [], "ended": []}
    for index, (batch, count) in enumerate(stream.sequential(128)):
        key = jax.random.fold_in(hj.root_key(0, hj.Purpose.EVALUATION), index)
        asked, read = jnp.asarray(batch.tokens), jnp.asarray(batch.mask)
        limits: Any = {"max_new_tokens": MOST_NEW, "eos_ids": policy.eos_ids}
        drawn = hj.sample(policy.model, policy.params, asked, read, key, **limits)
        rows = jnp.concatenate([asked, drawn.tokens], axis=1)
        of_rows = start.params, rows, jnp.concatenate([read, drawn.attention_mask], axis=1)
        before = hj.next_token_log_probs(start.model, *of_rows)[:, -MOST_NEW:]
        kl = jnp.where(drawn.action_mask, drawn.log_probs - before, 0.0).sum(axis=1)
        tokens, mask = np.asarray(drawn.tokens)[:count], np.asarray(drawn.action_mask)[:count]
        found["kl"] += np.asarray(kl)[:count].tolist()
        found["tokens"] += mask.sum(axis=1).tolist()
        found["ended"] += ended(tokens, mask, policy.eos_ids).tolist()
        responses += decode_responses(policy.tokenizer, batch.unpadded()[:count], tokens, mask, policy.eos_ids)
    for name, score in judges.items():
        found[name] = [SCALE * each for each in score(prompts, responses)]
        found[f"{name}_positive"] = [float(each > 0) for each in found[name]]
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {**means, **{f"distinct_{n}": distinct_n(responses, n) for n in (1, 2)}, "sample": responses[:8]}


def held_out_prompts(policy: hj.Policy) -> list[str]:
    return short([row["prompt"] for row in rows_of(DATA / "held_out.jsonl")], policy)


def best_of_n(start: hj.Policy, judges: Mapping[str, NaiveBayesSvm]) -> list[dict[str, float]]:
    """The best of n answers of the start by judge A, whose KL is at most log n − (n − 1) / n."""
    answers = start.generate(held_out_prompts(start), num_samples=16, seed=1)
    texts = [answer.prompt for answer in answers], [answer.response for answer in answers]
    scores = {name: SCALE * np.asarray(score(*texts)) for name, score in judges.items()}
    found = []
    for n in (2, 4, 8, 16):
        best = scores["A"].reshape(-1, n).argmax(axis=1)
        chosen = {name: each.reshape(-1, n)[np.arange(len(best)), best] for name, each in scores.items()}
        positive = {f"{name}_positive": float((each > 0).mean()) for name, each in chosen.items()}
        means = {name: float(each.mean()) for name, each in chosen.items()}
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **means, **positive})
    return found


def by_length(start: hj.Policy, score: NaiveBayesSvm) -> float:
    """The slope of a judge's margin in the tokens of an answer, over answers of the start."""
    answers = start.generate(held_out_prompts(start), num_samples=16, seed=2)
    margins = score([answer.prompt for answer in answers], [answer.response for answer in answers])
    tokens = [len(start.tokenizer.encode(answer.response)) + answer.complete for answer in answers]
    return SCALE * float(np.polyfit(tokens, margins, 1)[0])


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The content of a JSON file, which is made first unless it is there."""
    if not path.is_file():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def run(
    method: str, strength: float, seed: int, start: hj.Policy, judges: Any, reward: Mapping[str, str]
) -> dict[str, Any]:
    """The result of a run."""

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        policy = learn(method, strength, seed, reward)
        seconds = time.perf_counter() - began
        return {**measure(policy, start, judges), "seconds": seconds}

    found = kept(folder(method, strength, seed) / "result.json", make)
    print(
        method, strength, seed, {name: round(found[name], 3) for name in ("A", "B", "kl", "tokens")}, flush=True
    )
    return {"method": method, "strength": strength, "seed": seed, **found}


SHOWN = {
    "A": "judge A, learned from",
    "B": "judge B, held out",
    "B_at_length": "B at the start's length",
    "B_positive": "positive to B",
    "kl": "KL, nats",
    "tokens": "tokens",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}


def table(results: Mapping[str, Any]) -> str:
    """The means over the seeds, and in brackets the value of each seed."""
    start, slope = results["start"], results["margin_by_token"]

    def cell(name: str, runs: Sequence[Mapping[str, float]]) -> str:
        values = [
            run["B"] - slope * (run["tokens"] - start["tokens"]) if name == "B_at_length" else run[name]
            for run in runs
        ]
        seeds = ", ".join(f"{value:.2f}" for value in values)
        mean = f"{statistics.mean(values):.2f}"
        return f"{mean} ({seeds})" if name in ("A", "B", "kl") and len(runs) > 1 else mean

    lines = ["| | " + " | ".join(SHOWN.values()) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    lines.append("| start | " + " | ".join(cell(name, [start]) for name in SHOWN) + " |")
    for method, strength in dict.fromkeys((run["method"], run["strength"]) for run in results["runs"]):
        runs = [run for run in results["runs"] if (run["method"], run["strength"]) == (method, strength)]
        lines.append(f"| {method} {strength:g} | " + " | ".join(cell(name, runs) for name in SHOWN) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/imdb_full"))
    parser.add_argument("--language-model-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", choices=tuple(METHODS), nargs="+", default=list(METHODS))
    options = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    if not (DATA / "train.txt").is_file():
        write_data(options.data, 60_000, 512)
    steps = options.language_model_steps
    train(LANGUAGE_MODEL, RUNS[LANGUAGE_MODEL], [f"steps={steps}", f"checkpoint.export_every={steps}"])
    start = load_pretrained_policy(start_folder(), [f"sampler.max_new_tokens={MOST_NEW}"])
    reward = judge(options.data, "first")
    judges = {
        name: NaiveBayesSvm(**{key: value for key, value in judge(options.data, half).items() if key != "name"})
        for name, half in (("A", "first"), ("B", "second"))
    }
    if not PAIRS.is_file():
        write_pairs(start, judges["A"])
    results: dict[str, Any] = {
        "start": kept(HERE / "start.json", lambda: measure(start, start, judges)),
        "best_of_n": kept(HERE / "best_of_n.json", lambda: best_of_n(start, judges)),
        "margin_by_token": kept(HERE / "margin_by_token.json", lambda: by_length(start, judges["B"])),
        "runs": [],
    }
    # Seeds outermost, so that a first picture is there early.
    for seed in options.seeds:
        for method in options.only:
            for strength in METHODS[method][1]:
                results["runs"].append(run(method, strength, seed, start, judges, reward))
                (HERE / "results.json").write_text(json.dumps(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
