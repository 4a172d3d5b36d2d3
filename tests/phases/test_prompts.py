"""Prompts on their way to a policy: how many lengths they are padded to, each of which compiles a step."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.rope import Linear, LongRope
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.prompts import prompt_stream
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training.loop import take_step, train

REWARD = CompositeReward({"none": Part(lambda responses: [0.0] * len(responses))})
LENGTHS = (5, 20, 40, 70, 100, 150)  # characters, and so bytes


def stream(rope_scaling=None, **settings):
    tokenizer = Bytes().build([])
    extra = len(tokenizer.encode("")) if hasattr(tokenizer, "encode") else 0
    examples = [Example("a" * (length - extra)) for length in LENGTHS]
    config = PPO(reward=REWARD, sampler=Ancestral(max_new_tokens=56), **settings)
    model = SimpleNamespace(max_length=256, config=SimpleNamespace(rope_scaling=rope_scaling))
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


def test_rows_in_which_rotary_angles_would_change_between_sampling_and_scoring_are_refused():
    assert stream(rope_scaling=LongRope((1.0,), (2.0,), 206)).longest == 150  # and 56 new tokens
    assert stream(rope_scaling=Linear(2.0)).longest == 150
    with pytest.raises(UserError) as refused:
        stream(rope_scaling=LongRope((1.0,), (2.0,), 205))
    assert str(refused.value).startswith(
        "phases.ppo: rows must have at most 205 tokens, got prompts of 150 and "
        "phases.ppo.sampler.max_new_tokens 56: beyond that the model's rope_scaling turns all tokens by other "
    )


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


SHARED = [
    "phases.sft={batch_size: 4, length: 96, packing: false}",
    "phases.ppo.prompts=shared",
    "phases.ppo.prompts_per_step=4",
    "phases.ppo.minibatches=1",
    "scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 1, ppo: 1}}",
    "evaluation={num_prompts: 0, num_examples: 0}",
    "compilation_cache=null",
]


def built(folder, *overrides):
    config = Path(__file__).parents[2] / "configs" / "debug" / "hybrid.yaml"
    return build(load_config(config, [f"run_dir={folder}", *SHARED, *overrides]))


def test_shared_prompts_are_those_of_the_batch_that_was_just_learned(tmp_path, monkeypatch):
    experiment = built(tmp_path)
    state, sft, rollouts = experiment.init(), experiment.phases["sft"], experiment.phases["ppo"].rollouts
    tokenizer, texts = experiment.tokenizer, []
    asked = rollouts._prompt_batch
    monkeypatch.setattr(
        rollouts, "_prompt_batch", lambda cursor: texts.append(asked(cursor)[0]) or asked(cursor)
    )
    for step in range(3):
        learned = sft.stream.batch(4 * step, 4)
        for _ in range(2):
            phase = experiment.phases[experiment.scheduler.choose(state.schedule)]
            state = take_step(experiment, phase, state)
        answered = texts[step].examples
        assert len({example.prompt for example in answered}) > 1
        for row, example in enumerate(answered):
            whole = tokenizer.decode([int(t) for t in learned.tokens[row][learned.segment_ids[row] > 0][:-1]])
            assert len(whole) > len(example.prompt)
            assert (example.prompt + example.response).startswith(whole)  # cut where the row ends
    assert state.cursors == {"sft": 12}  # all that a run needs to go on with the same prompts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["phases.sft.packing=true"],
            "phases.sft.packing must be false for phases.ppo.prompts",
        ),
        (
            ["phases.sft.batch_size=8"],
            "prompts_per_step must be phases.sft.batch_size, 8, for",
        ),
        (
            ["scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 0, ppo: 1}}", "phases.sft=null"],
            r"prompts: shared needs one phase of sft that takes steps, got none",
        ),
        (
            ["phases.ppo.max_prompt_length=20"],
            r"shared needs one row for each of the \d+ examples, phases",
        ),
    ],
)
def test_prompts_that_cannot_be_shared_are_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        built(tmp_path, *overrides)


def test_a_run_with_shared_prompts_begins_by_learning(tmp_path):
    experiment = built(tmp_path, "scheduler={name: alternation, warmup: {sft: 0}, cycle: {ppo: 1, sft: 1}}")
    with pytest.raises(UserError, match="shared needs a step of sft before the first of ppo"):
        experiment.phases["ppo"].step(experiment.init(), experiment.key)


@pytest.mark.slow
def test_a_resumed_run_answers_the_same_shared_prompts(tmp_path):
    ends = ["steps=4", "checkpoint={every: 3, keep: 4}"]  # between the batch and its answers
    whole = train(built(tmp_path, *ends))
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    resumed = train(built(tmp_path, *ends))
    leaves = [jax.tree.leaves((state.train, dict(state.host))) for state in (whole, resumed)]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    assert whole.cursors == resumed.cursors == {"sft": 8}
