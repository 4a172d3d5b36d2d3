"""Prompts whose answers all earn the same are replaced by further ones, within the step."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.phases.clock import Clock
from hybrid_jax.training.loop import train

PROMPTS, ANSWERS = 4, 2
DAPO = {
    "name": "dapo",
    "prompts_per_step": PROMPTS,
    "samples_per_prompt": ANSWERS,
    "refill_rounds": 6,
    "missing_eos_penalty": None,
    "sampler": {"max_new_tokens": 4},
    "optimizer": {"name": "sgd", "learning_rate": 0.1},
}
SETTINGS = {
    "steps": 4,
    "model": {"name": "decoder", "num_layers": 1, "width": 16, "num_heads": 2, "max_length": 48},
    "tokenizer": "bytes",
    "scheduler": {"name": "alternation", "cycle": {"rl": 1}},
    "evaluation": {"num_prompts": 0, "num_examples": 0},
    "checkpoint": {"every": 2, "keep": 4},
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """``experiment(reward)`` builds DAPO on prompts that are the numbers 0 to 29."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(30)))

    def built(reward, run="run", settings=None, **changes):
        phase = {**DAPO, "reward": {"parts": {"odd": {"reward": f"odd_prompts:{reward}"}}}, **changes}
        data = {"name": "jsonl", "train": str(file), "held_out": str(file), "response_field": None}
        config = {**SETTINGS, "run_dir": str(tmp_path / run), "data": data, "phases": {"rl": phase}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, **(settings or {})}))
        return build(load_config(tmp_path / "config.yaml"))

    return built


def played(built):
    """What the first step of a run learns from."""
    rollouts, state = built.phases["rl"].rollouts, built.init()
    return rollouts.play(state, jax.random.key(3), jax.random.key(4), Clock())


def numbers(rollout) -> list[int]:
    """The prompts of a rollout, row by row."""
    rows = zip(rollout.tokens[:, :-4], rollout.attention_mask[:, :-4], strict=True)
    return [int(bytes(np.asarray(tokens)[np.asarray(mask)].tolist())) for tokens, mask in rows]


def expected(built, rounds) -> tuple[list[int | None], int]:
    """The odd prompts of so many batches, by the places that they fill, and the number of even ones."""
    stream, even = built.phases["rl"].rollouts.prompts, 0
    places: list[int | None] = [None] * PROMPTS
    for number in range(rounds):
        asked = [int(e.prompt) for e in stream.batch(number * PROMPTS, PROMPTS).examples]
        even += sum(prompt % 2 == 0 for prompt in asked)
        odd = [prompt if prompt % 2 else None for prompt in asked]
        if number == 0:
            places = odd
            continue
        for prompt in filter(None, odd):
            if None in places:
                places[places.index(None)] = prompt
    return places, even


@pytest.mark.parametrize("reward", ["OnTexts", "OnTokens"])
def test_a_batch_holds_only_prompts_whose_answers_differ(reward, experiment):
    built = experiment(reward)
    found = played(built)
    rounds = found.metrics["rounds"]
    places, even = expected(built, rounds)
    assert None in expected(built, 1)[0]  # something was refilled
    assert None in expected(built, rounds - 1)[0]  # and no round was in vain
    assert numbers(found.rollout) == [prompt for prompt in places for _ in range(ANSWERS)]
    assert found.rollout.counts.all()
    assert (found.metrics["filtered_groups"], found.cursors) == (even, {"rl": rounds * PROMPTS})
    np.testing.assert_array_equal(found.rollout.group, np.arange(PROMPTS * ANSWERS) // ANSWERS)


def test_what_moves_is_a_whole_row(experiment):
    """Tokens, masks and log-probabilities come from the same answer: the ratio of a fresh policy is 1."""
    built = experiment("OnTokens")
    phase, metrics = built.phases["rl"], {}
    state, metrics = phase.step(built.init(), jax.random.key(0))
    assert metrics["rl/rounds"] > 1
    assert float(metrics["rl/first_ratio"]) == pytest.approx(1.0, abs=1e-5)
    for _ in range(3):
        state, _ = phase.step(state, jax.random.key(1))
    rollouts = phase.rollouts
    assert [rollouts._sample._cache_size(), rollouts._refill.merge._cache_size()] == [1, 1]  # compiled once


def test_where_nothing_differs_within_the_rounds_the_rest_does_not_count(experiment):
    built = experiment("OnTexts", refill_rounds=1)
    found, functions = played(built), built.phases["rl"].functions
    odd = np.array([number % 2 == 1 for number in numbers(found.rollout)])
    assert 0 < odd.sum() < len(odd)
    np.testing.assert_array_equal(found.rollout.counts, odd)
    learned, _ = functions.advantages(found.rollout, jnp.zeros(()))
    for of_rows in (learned.advantages, learned.loss_weights, learned.loss_shares[:, None]):
        assert not np.asarray(of_rows)[~odd].any()
        assert np.asarray(of_rows)[odd].any(axis=1).all()


def test_a_step_without_any_difference_changes_no_parameter(experiment):
    built = experiment("Alike", refill_rounds=3)
    state = built.init()
    before = jax.tree.map(np.array, state.train.params)
    state, metrics = built.phases["rl"].step(state, jax.random.key(0))
    assert (metrics["rl/rounds"], metrics["rl/filtered_groups"]) == (3, 3 * PROMPTS)
    assert float(metrics["rl/score"]) == pytest.approx(0.7)
    jax.tree.map(np.testing.assert_array_equal, before, state.train.params)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_a_resumed_run_asks_what_it_had_not_asked(experiment, tmp_path):
    whole = train(experiment("OnTexts"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = train(experiment("OnTexts"))
    assert resumed.cursors == whole.cursors
    assert whole.cursors["rl"] > 4 * PROMPTS
    assert bits(resumed.train) == bits(whole.train)


@pytest.mark.slow
def test_eight_devices_fill_the_batch_of_one(experiment):
    one = played(experiment("OnTexts", "one")).rollout
    many = played(experiment("OnTexts", "many", {"mesh": {"data": 8}})).rollout
    assert len(many.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.log_probs, many.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout_ahead": True}, "refill_rounds must be null with rollout_ahead: true"),
        ({"samples_per_prompt": 1, "advantage": "returns"}, "samples_per_prompt must be at least 2 for refill"),
        ({"samples_per_prompt": 1, "refill_rounds": None}, "samples_per_prompt must be at least 2, got 1"),
    ],
)
def test_groups_that_cannot_be_compared_or_replaced_are_one_clear_line(changes, words, experiment):
    with pytest.raises(UserError, match=words):
        experiment("OnTexts", **changes)
