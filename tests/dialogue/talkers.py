"""Worlds for tests of conversations, and a small model that talks with them."""

from __future__ import annotations

import time
from typing import Annotated

import jax
import numpy as np
from annotated_types import Ge

from hybrid_jax.core.ranges import Natural, settings
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.dialogue.conversation import ConversationSettings
from hybrid_jax.dialogue.converse import Converser, Opening
from hybrid_jax.environments.base import Step
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.sampling.turns import TurnEngine


@settings
class Counting:
    """A world that says something of another length in every turn, after another pause."""

    turns: Natural = 3  # 0 draws them from the seed
    seconds: Annotated[float, Ge(0)] = 0.0  # the longest pause
    ends: bool = True  # by itself; else it would go on

    def make(self, answer_fn=None):
        return CountingWorld(self)


class CountingWorld:
    def __init__(self, settings):
        self.settings = settings

    def reset(self, seed, **row):
        self.random = np.random.default_rng(seed)
        self.turns = self.settings.turns or int(self.random.integers(1, 6))
        self.number = 0
        return [
            {"role": "user", "content": f"Hi {self.random.integers(10 ** int(self.random.integers(1, 6)))}"}
        ]

    def step(self, text):
        self.number += 1
        time.sleep(self.settings.seconds * self.random.random())
        reply = "x" * int(self.random.integers(1, 16))
        over = self.settings.ends and self.number == self.turns
        return Step([{"role": "user", "content": reply}], float(self.number), over, info={"letters": len(text)})


def model_and_params(scale=3.0, **settings):
    """A small decoder with lively weights, its parameters and its tokenizer."""
    tokenizer = Bytes("chatml").build()
    sizes = {"num_layers": 2, "width": 32, "num_heads": 4, "max_length": 640, **settings}
    model = DecoderConfig(**sizes).build(tokenizer.vocab_size)
    return model, jax.tree.map(lambda x: scale * x, model.init(jax.random.key(0))), tokenizer


def converser(model, tokenizer, environment, max_new_tokens=12, **settings):
    """Holds conversations of up to 600 tokens; an answer ends with the template's end of turn."""
    settings = ConversationSettings(**{"max_turns": 10, "max_tokens": 600, "max_reply_tokens": 64, **settings})
    ends = (tokenizer.special_tokens["<|im_end|>"],)
    engine = TurnEngine(model, ends, max_new_tokens, settings.max_tokens)
    return Converser(engine, environment, settings, tokenizer, 40, settings.slots or 8)


def openings(count, first=0):
    """The beginnings of so many conversations."""
    return [Opening(first + i, {}) for i in range(count)]
