"""The gain of conversations that wait for nobody, on GPT-2 shapes; prints one JSON line.

    python scripts/bench_conversations.py --size mini
    python scripts/bench_conversations.py --size mini --slots 64 --world-seconds 0.2

64 conversations of 1 to 16 turns, a number drawn from the seed, with a world that takes 50 ms for each reply.
The model ends an answer with the same probability at every token, so lengths are geometric; weights are random.
Two ways take turns, with the same keys, so that they sample the same number of tokens up to rounding:

    ours       `Converser`: rows that have their reply go on while others wait, and a new conversation takes
               the place of one that has ended
    lock-step  ``--slots`` conversations at a time: all answer, until the longest answer has ended; all worlds
               step, on threads of their own; all read; and the next ones begin when the last has ended

Both keep the cache over the turns. ``ratio`` is the median over turns of the tokens that we sample a second, by
those of lock-step.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_work import SHAPES, work_of

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.dialogue.conversation import ConversationSettings
from hybrid_jax.dialogue.converse import Converser, Opening
from hybrid_jax.environments.base import Step
from hybrid_jax.experiment import environment
from hybrid_jax.models.base import Params
from hybrid_jax.sampling.logits import response_keys
from hybrid_jax.sampling.turns import TurnEngine

OPENING, REPLY, MAX_REPLY = 48, "go on, please", 32
MEAN_ANSWER, MAX_ANSWER = 16, 48  # tokens


@dataclass(frozen=True)
class Slow:
    """A world of 1 to ``turns`` turns that takes its time."""

    turns: int
    seconds: float

    def make(self, answer_fn: Any = None) -> SlowWorld:
        return SlowWorld(self)


class SlowWorld:
    """One conversation."""

    def __init__(self, settings: Slow):
        self._settings = settings

    def reset(self, seed: int, **row: Any) -> list[dict[str, str]]:
        self._left = random.Random(seed).randint(1, self._settings.turns)
        return [{"role": "user", "content": "hello"}]

    def step(self, text: str) -> Step:
        time.sleep(self._settings.seconds)
        self._left -= 1
        return Step([{"role": "user", "content": REPLY}], 0.0, self._left == 0)


class LockStep:
    """Conversations that wait for each other."""

    def __init__(self, engine: TurnEngine, world: Slow, converser: Converser):
        self._world, self._converser, self._slots = world, converser, converser.slots
        self._begin = jax.jit(partial(began, engine))
        self._read = jax.jit(engine.read, donate_argnums=1)
        self._decode = jax.jit(engine.decode, donate_argnums=1)
        self._harvest = jax.jit(engine.harvest)
        self._ends = engine.eos_ids

    def __call__(self, params: Params, key: Any, openings: Sequence[Opening]) -> int:
        """Holds all conversations; returns the number of tokens that were sampled."""
        with ThreadPoolExecutor(self._slots) as threads:
            starts = range(0, len(openings), self._slots)
            parts = [range(start, min(start + self._slots, len(openings))) for start in starts]
            return sum(self._together(params, key, openings, part, threads) for part in parts)

    def _together(self, params, key, openings, part, threads) -> int:
        worlds = [self._world.make() for _ in part]
        first = [world.reset(openings[number].seed) for world, number in zip(worlds, part, strict=True)]
        prompts = [self._converser.opening_tokens(messages, ()) for messages in first]
        numbers = np.zeros(self._slots, np.int32)
        numbers[: len(part)] = part
        state = self._begin(params, *padded(prompts, self._slots, OPENING), key, numbers)
        alive = range(len(part))
        while alive:
            state = self._decode(params, state, np.int32(MAX_ANSWER))
            last = np.asarray(state.talks.token)
            steps = list(threads.map(lambda row: worlds[row].step(""), alive))
            replies: list[list[int]] = [[] for _ in range(self._slots)]
            for row, step in zip(alive, steps, strict=True):
                if not step.terminated:
                    ended = last[row].item() in self._ends
                    replies[row] = self._converser.reply_tokens(step.messages, (), ended)
            goes_on = np.array([bool(reply) for reply in replies])
            alive = np.flatnonzero(goes_on).tolist()
            rows = np.where(goes_on, np.arange(self._slots), self._slots)
            state = self._read(params, state, rows, *padded(replies, self._slots, MAX_REPLY), goes_on)
        return int(self._harvest(state).action_mask[: len(part)].sum())


def began(engine: TurnEngine, params, prompts, mask, key, numbers):
    """The state once all openings were read."""
    rows = len(prompts)
    state = engine.init(rows, OPENING)
    return engine.admit(params, state, jnp.arange(rows), prompts, mask, response_keys(key, numbers))


def padded(texts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their mask, on the left; a row without tokens reads one that means nothing."""
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    mask[:, -1] = True
    for row, text in enumerate(texts):
        if text:
            tokens[row, -len(text) :], mask[row, -len(text) :] = text, True
    return tokens, mask


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    ours, lock_step = sides(options)
    openings = [Opening(seed, {}) for seed in range(options.conversations)]
    for side in (ours, lock_step):
        side(jax.random.key(0), openings)  # compile
    rates: dict[str, list[float]] = {"ours": [], "lock_step": []}
    counts = set()
    for turn in range(options.turns):
        for name, side in (("lock_step", lock_step), ("ours", ours)):
            began_at = time.perf_counter()
            tokens = side(jax.random.key(turn), openings)
            rates[name].append(tokens / (time.perf_counter() - began_at))
            counts.add((turn, tokens))
    here = environment()
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    numbers = {f"{name}_tokens_per_second": round(statistics.median(rate), 1) for name, rate in rates.items()}
    record = {**vars(options), **numbers, "ratio": round(statistics.median(ratios), 3)}
    record |= {"same_tokens": len(counts) == options.turns, "commit": here["commit"]}
    print(json.dumps(record | {"device": f"{here['devices'][0]}, {here['cpu_count']} cores"}))


def sides(options: Any) -> tuple[Callable[[Any, Sequence[Opening]], int], Callable[..., int]]:
    """Both ways of holding the conversations; each returns the number of tokens sampled."""
    tokenizer = Bytes("chatml").build()
    model = replace(work_of("rollout", options.size).decoder(), head_bias=True).build(tokenizer.vocab_size)
    params = model.init(jax.random.key(0))
    end = tokenizer.special_tokens["<|im_end|>"]
    bias = params["lm_head"]["bias"].at[end].set(np.log(tokenizer.vocab_size / MEAN_ANSWER))
    params = {**params, "lm_head": {**params["lm_head"], "bias": bias}}
    settings = ConversationSettings(
        max_turns=options.longest,
        max_tokens=options.longest * (MAX_ANSWER + MAX_REPLY),
        max_reply_tokens=MAX_REPLY,
    )
    engine = TurnEngine(model, (end,), MAX_ANSWER, settings.max_tokens)
    world = Slow(options.longest, options.world_seconds)
    converser = Converser(engine, world, settings, tokenizer, OPENING, options.slots)
    lock_step = LockStep(engine, world, converser)

    def ours(key: Any, openings: Sequence[Opening]) -> int:
        talks = converser.converse(params, key, openings).conversations
        return sum(int(talk.chosen.sum()) for talk in talks)

    return ours, lambda key, openings: lock_step(params, key, openings)


def parse(arguments: list[str]) -> Any:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(prog="bench_conversations.py", description=description, epilog=epilog)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16, help="conversations at a time")
    parser.add_argument("--longest", type=int, default=16, help="turns of a conversation")
    parser.add_argument("--world-seconds", type=float, default=0.05, help="that a reply takes")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    for name, number in vars(options).items():
        if isinstance(number, int) and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    return options


if __name__ == "__main__":
    run_command(main)
