"""Prompts on their way to a policy: how many lengths they are padded to, each of which compiles a step."""

from types import SimpleNamespace
from typing import Any

import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.prompts import prompt_stream
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.sampling.ancestral import Ancestral

REWARD = CompositeReward({"none": Part(lambda responses: [0.0] * len(responses))})
LENGTHS = (5, 20, 40, 70, 100, 150)  # characters, and so bytes


def stream(**settings):
    tokenizer = Bytes().build([])
    extra = len(tokenizer.encode("")) if hasattr(tokenizer, "encode") else 0
    examples = [Example("a" * (length - extra)) for length in LENGTHS]
    config = PPO(reward=REWARD, sampler=Ancestral(max_new_tokens=56), **settings)
    model = SimpleNamespace(max_length=256)
    resources: Any = SimpleNamespace(name="ppo", model=model, examples=examples, tokenizer=tokenizer, seed=0)
    return prompt_stream(config, resources)


def lengths(prompts):
    return sorted({prompts.batch(row, 1).tokens.shape[1] for row in range(len(LENGTHS))})


def test_prompts_are_padded_to_halves_of_the_longest_unless_the_user_says_to_what():
    longest = stream().longest
    assert lengths(stream())[-1] >= longest
    assert len(lengths(stream())) == 3
    assert lengths(stream(prompt_buckets=(160,))) == [160]
    assert lengths(stream(prompt_buckets=(160, 64))) == [64, 160]


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((64, 201), "phases.ppo.prompt_buckets must be at most the 200 tokens that a prompt may have, got 201"),
        (
            (64, 100),
            "phases.ppo.prompt_buckets must hold the longest prompt, of 150 tokens, got [64, 100]; add a "
            "length, or set phases.ppo.max_prompt_length to 100",
        ),
    ],
)
def test_lengths_that_do_not_fit_the_prompts_are_one_line(buckets, message):
    with pytest.raises(UserError) as refused:
        stream(prompt_buckets=buckets)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((), "prompt_buckets must not be empty, got \\(\\)"),
        ((0, 64), r"prompt_buckets\[0\] must be at least 1, got 0"),
        ((64, 64), r"prompt_buckets must be different lengths, got \[64, 64\]"),
    ],
)
def test_lengths_are_different_and_positive(buckets, message):
    with pytest.raises(ValueError, match=message):
        stream(prompt_buckets=buckets)
