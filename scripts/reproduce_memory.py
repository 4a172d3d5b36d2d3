"""An LSTM that PPO has taught to remember, with its state and without; the figures of docs/results.md.

    python scripts/reproduce_memory.py --seeds 0 1 2 --folder runs/memory

Trains `configs/worlds/memory_length_lstm.yaml`, ten turns from what is told to the question, and prints the
share of right answers in 256 new conversations of ten, twenty and forty turns: as it is, and with the state
emptied before every message: the policy then knows the last one alone. What is there already is only measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hybrid_jax as hj
from hybrid_jax.core.arrays import choose_rows
from hybrid_jax.dialogue.conversation import ConversationSettings
from hybrid_jax.dialogue.converse import Converser, Opening
from hybrid_jax.environments.memory import MemoryLength
from hybrid_jax.models.recurrent.model import RecurrentModel
from hybrid_jax.runs.policy import Policy
from hybrid_jax.sampling.turns import TurnEngine

CONFIG = "configs/worlds/memory_length_lstm.yaml"
FIRST_SEED, COUNT = 10_000, 256  # of new conversations


@dataclass(frozen=True)
class Forgetting(RecurrentModel):
    """A recurrent model that begins anew with each message that it reads."""

    def extend(self, params, tokens, attention_mask, cache):
        """`LanguageModel.extend` of an empty cache, in the rows that read anything."""
        reads = (attention_mask > 0).any(axis=1)
        emptied = choose_rows(reads, self.init_cache(len(tokens), 1), cache)
        return super().extend(params, tokens, attention_mask, emptied)


def right(policy: Policy, kind: type[RecurrentModel], turns: int) -> float:
    """The share of conversations whose question is answered as it should be, answers sampled."""
    tokens = 9 * (turns + 2)  # of a conversation; a turn has five or six
    settings = ConversationSettings(max_turns=turns + 2, max_tokens=tokens, max_reply_tokens=16)
    engine = TurnEngine(kind(policy.model.config), policy.eos_ids, 3, tokens)  # type: ignore
    world: Any = MemoryLength(length=turns)
    converser = Converser(engine, world, settings, policy.tokenizer, 8, slots=64)
    openings = [Opening(FIRST_SEED + number, {}) for number in range(COUNT)]
    talks = converser.converse(policy.params, jax.random.key(0), openings).conversations
    return float(np.mean([talk.reward > 0 for talk in talks]))


def main() -> None:
    """Trains with each seed and prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/memory"), help="of the runs")
    options = parser.parse_args()
    print("| seed | 10 turns | 20 turns | 40 turns | 10 turns, state emptied |\n|---|---|---|---|---|")
    for seed in options.seeds:
        here = options.folder / f"lstm_{seed}"
        if not (here / "report.html").is_file():
            hj.build(hj.load_config(CONFIG, [f"run_dir={here}", f"seed={seed}"])).train()
        policy = hj.load_policy(str(here))
        shares = [right(policy, RecurrentModel, turns) for turns in (10, 20, 40)]
        shares.append(right(policy, Forgetting, 10))
        print(f"| {seed} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
