"""Compares what decoders give and cost on the same prompts; prints a markdown table.

    python scripts/decoders_table.py --run runs/tinyshakespeare --prompts prompts.txt --judge runs/kneser_ney \\
        "temperature=0" "temperature=0 repetition_penalty=1.2" min_p=0.1 "name=best_of_n n=8"

Each sampler is its settings over those of `ancestral` at temperature 1, without the prefix ``sampler.``; the
first row is `ancestral` itself, whose tokens a second the others are divided by. Columns:

    speed            tokens in answers a second, over ancestral's beside it: the median of three turns, compiled
    own, judge       nats a token of the answers under the model itself, ends included, and of their texts
                     behind the prompts under the judge, temperature 1; empty where no answer has a token
    distinct-n       different word n-grams of all answers, over their number
    repeated 4       share of the word 4-grams of an answer that it has used before, the mean of the answers
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import read_text
from hybrid_jax.core.ranges import settings
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.core.yaml_text import parse_yaml
from hybrid_jax.data.continuations import encode_continuations, encode_prompts
from hybrid_jax.experiment import environment
from hybrid_jax.metrics.text import distinct_n, repetition_rate
from hybrid_jax.models.scoring import next_token_log_probs
from hybrid_jax.rewards.base import REWARDS, evaluate_reward
from hybrid_jax.runs.policy import Policy, load_policy, load_pretrained_policy
from hybrid_jax.runs.samplers import overridden
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import Sampler, sample
from hybrid_jax.sampling.responses import decode_responses, join

TURNS = 3


@settings
class Rewarded:
    """The reward of a table."""

    reward: Annotated[Any, REWARDS]


def main(arguments: list[str]) -> None:
    options = arguments_of(arguments)
    policy = load_policy(options.run) if options.run else load_pretrained_policy(options.model)
    judge = load_pretrained_policy(options.judge) if options.judge else None
    reward = None
    if options.reward:
        reward = parse(Rewarded, {"reward": parse_yaml(options.reward, "--reward")}, trust=EVERYTHING).reward
    prompts = [line for line in read_text(options.prompts, 2**20, "prompts file").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {options.prompts} has no line with a prompt")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    start = Ancestral(max_new_tokens=options.max_new_tokens)
    samplers: dict[str, Sampler] = {"ancestral": start}
    for given in options.samplers:
        samplers[given] = overridden(start, [f"sampler.{setting}" for setting in shlex.split(given)])
    names = ["speed", *(["reward"] if reward else []), "own", *(["judge"] if judge else [])]
    names += ["distinct-1", "distinct-2", "distinct-4", "repeated 4"]
    print("| sampler | " + " | ".join(names) + " |\n" + "|---" * (1 + len(names)) + "|")
    ancestral = Drawing(replace(policy, sampler=start), prompts, options.seed)
    for name, sampler in samplers.items():
        drawing = Drawing(replace(policy, sampler=sampler), prompts, options.seed)
        ratios = [drawing.speed() / ancestral.speed() for _ in range(TURNS)]
        texts = drawing.texts
        row = {"speed": f"{np.median(ratios):.2f}", "own": drawing.own}
        row["judge"] = judged(judge, prompts, texts) if judge else ""
        row["reward"] = f"{np.mean(evaluate_reward('reward', reward, prompts, texts)):.3f}" if reward else ""
        row |= {f"distinct-{n}": f"{distinct_n(texts, n):.3f}" for n in (1, 2, 4)}
        row["repeated 4"] = f"{np.mean([repetition_rate(text, 4) for text in texts]):.3f}"
        print(f"| `{name}` | " + " | ".join(row[column] for column in names) + " |", flush=True)
        if options.show:
            print(f"{texts[0]!r}", file=sys.stderr)
    here = environment()
    print(
        f"\n{len(prompts)} prompts, {options.max_new_tokens} tokens, seed {options.seed}, ancestral "
        f"{ancestral.speed():,.0f} tokens/s, {here['devices'][0]}, {here['cpu_count']} cores, "
        f"commit {here['commit']}"
    )


def arguments_of(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="decoders_table.py", description=description, epilog=epilog)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR")
    source.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="one a line")
    parser.add_argument("--judge", metavar="FOLDER", help="a language model that the answers are scored by")
    parser.add_argument("--reward", metavar="YAML", help="of an answer, such as '{name: length, target: 12}'")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="the first answer of each, on stderr")
    parser.add_argument("samplers", nargs="*", metavar="'a=value b=value'")
    return parser.parse_intermixed_args(arguments)


class Drawing:
    """Answers of a policy to some prompts, compiled and drawn once."""

    def __init__(self, policy: Policy, prompts: list[str], seed: int):
        ids = encode_prompts(policy.tokenizer, prompts)
        self._policy = policy
        self._inputs = (policy.model, policy.params, *padded(ids), jax.random.key(seed))
        drawn = self._draw()
        tokens, mask = np.asarray(drawn.tokens), np.asarray(drawn.action_mask)
        self.texts = decode_responses(policy.tokenizer, ids, tokens, mask, policy.eos_ids)
        rows, read = join(*self._inputs[2:4], drawn)
        self.own = nats(policy, rows, read, drawn.action_mask)
        self._num_tokens = mask.sum()

    def _draw(self) -> Any:
        how = {"eos_ids": self._policy.eos_ids, "tokenizer": self._policy.tokenizer}
        return jax.block_until_ready(sample(self._policy.sampler, *self._inputs, **how))

    def speed(self) -> float:
        """Tokens in answers a second, of one more draw."""
        started = time.perf_counter()
        self._draw()
        return self._num_tokens / (time.perf_counter() - started)


def judged(policy: Policy, prompts: list[str], texts: list[str]) -> str:
    """`nats` of texts behind their prompts, as another model's tokenizer reads them, as far as it can read."""
    answers = encode_continuations(policy.tokenizer, prompts, texts)
    length = max(len(prompt) + len(answer) for prompt, answer, _ in answers)
    length = min(length, policy.model.max_length or length)
    tokens, there = np.zeros((len(rows), length), np.int32), np.zeros((2, len(rows), length), bool)
    for row, (prompt, answer, _) in enumerate(answers):
        said = [*prompt, *answer][:length]
        tokens[row, : len(said)], there[0, row, : len(said)] = said, True
        there[1, row, len(prompt) : len(said)] = True
    return nats(policy, jnp.asarray(tokens), jnp.asarray(there[0]), jnp.asarray(there[1][:, 1:]))


def nats(policy: Policy, tokens: Any, read: Any, answered: Any) -> str:
    """Mean −log p of the tokens of answers, the last ones of each row."""
    length = answered.shape[1]
    log_probs = next_token_log_probs(policy.model, policy.params, tokens, read)[:, -length:]
    count = int(jnp.sum(answered))
    return f"{-float(jnp.sum(jnp.where(answered, log_probs, 0.0))) / count:.3f}" if count else ""


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """Rows of tokens, left-padded, and which are real."""
    longest = max(map(len, rows))
    tokens = [[0] * (longest - len(row)) + list(row) for row in rows]
    mask = [[i >= longest - len(row) for i in range(longest)] for row in rows]
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


if __name__ == "__main__":
    run_command(main)
