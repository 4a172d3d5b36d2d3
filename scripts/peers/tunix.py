"""A peer of rollout: the sampler of google-tunix, on a Qwen3 of the same sizes. See `bench.py`."""

import json
import random
import sys
from importlib.metadata import version

sys.path.append(sys.path.pop(0))  # behind the packages: this file bears the name of one

from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3
from turns import Turns

BOS, PAD = 2, 0


def main():
    turns, work = Turns(), json.loads(sys.argv[1])
    step = rollout_step(work)
    turns.begin(**{"google-tunix": version("google-tunix"), "peer_jax": version("jax")})
    while True:
        step()
        turns.step_ended()


class Numbers:
    """The tokenizer of texts that are token ids; Tunix puts the start token before them."""

    def __init__(self, vocab_size):
        self._eos = vocab_size - 1

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return BOS

    def eos_id(self):
        return self._eos

    def pad_id(self):
        return PAD


def rollout_step(work):
    heads, channels = work["num_heads"], work["width"] // work["num_heads"]
    config = ModelConfig(
        num_layers=work["num_layers"],
        embed_dim=work["width"],
        hidden_dim=4 * work["width"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=channels,
        vocab_size=work["vocab_size"],
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    length, new = work["length"], work["new_tokens"]
    cache = CacheConfig(
        cache_size=length + new, num_layers=config.num_layers, num_kv_heads=heads, head_dim=channels
    )
    sampler = Sampler(Qwen3(config, rngs=nnx.Rngs(0)), Numbers(work["vocab_size"]), cache)
    draw = random.Random(0)
    ids = [[draw.randrange(3, work["vocab_size"] - 1) for _ in range(length - 1)] for _ in range(work["rows"])]
    prompts, seeds = [" ".join(map(str, row)) for row in ids], iter(range(sys.maxsize))

    def step():
        sampler(
            prompts,
            max_generation_steps=new,
            max_prompt_length=length,
            temperature=1.0,
            top_p=1.0,
            top_k=work["top_k"],
            pad_output=True,
            seed=next(seeds),
        )

    return step


if __name__ == "__main__":
    main()
