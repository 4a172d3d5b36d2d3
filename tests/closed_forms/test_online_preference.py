"""Preferences online, from a config on: the closed forms of 27 responses and of four arms."""

import json

import jax
import numpy as np
import pytest

from hybrid_jax.testing import optimum, reference_params, sequence_probabilities, true_reward
from hybrid_jax.training.loop import take_step

REFERENCE = sequence_probabilities(reference_params())
ARMS, VALUES = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, -1.0])
BANDIT = {"model": "worlds:Bandit", "tokenizer": {"name": "worlds:Digits", "count": 4}}
ADAM = {"name": "adam", "schedule": "linear", "max_grad_norm": None}
ONLINE = {"name": "online_preference", "missing_eos_penalty": None}


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def judge(values) -> dict:
    return {"parts": {"judge": {"reward": {"name": "worlds:Judge", "values": list(map(float, values))}}}}


def arms_of(params, temperature: float = 1.0) -> np.ndarray:
    """π of the four arms."""
    scores = np.asarray(params["table"], float)[0, :4] / temperature
    return np.exp(scores) / np.exp(scores).sum()


def test_online_dpo_on_bradley_terry_votes_reaches_the_optimum_of_rl(learned):
    beta = 1.0
    settings = {
        **ONLINE,
        "prompts_per_step": 512,
        "sampler": {"max_new_tokens": 3},
        "reward": judge([0, 0, 1]),
        "loss": {"name": "sigmoid", "beta": beta},
        "optimizer": {**ADAM, "learning_rate": 0.1},
    }
    policy = learned({"online": settings}, 150)
    best = optimum(REFERENCE, true_reward(), beta)
    assert distance(policy, best) < 0.04
    assert distance(REFERENCE, best) > 0.2
    assert distance(optimum(REFERENCE, true_reward(), 2 * beta), best) > 0.1


@pytest.fixture
def arms(trained):
    """``arms(changes, steps)`` learns from votes on the four arms and returns the state at the end."""

    def run(changes, steps):
        settings = {
            **ONLINE,
            "prompts_per_step": 1024,
            "sampler": {"max_new_tokens": 1},
            "reward": judge(VALUES),
            "optimizer": {**ADAM, "learning_rate": 0.1},
            **changes,
        }
        return trained({"online": settings}, steps, **BANDIT)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pairs", ["best_worst", "opponent"])
def test_the_optimum_is_one_of_the_distribution_that_samples_whoever_the_other_is(pairs, temperature, arms):
    references = {"begun": {"frozen_at": "start"}}
    changes = {"samples_per_prompt": 1, "opponent": {"reference": "begun"}} if pairs == "opponent" else {}
    sampler = {"max_new_tokens": 1, "temperature": temperature}
    loss = {"name": "sigmoid", "beta": 1.0}
    changes = {**changes, "pairs": pairs, "references": references, "sampler": sampler, "loss": loss}
    policy = arms_of(arms(changes, 200).policy, temperature)
    begun = ARMS ** (1 / temperature)
    best = optimum(begun / begun.sum(), VALUES, 1.0)
    assert distance(policy, best) < 0.02
    for other in (optimum(begun / begun.sum(), VALUES, 2.0), optimum(ARMS, VALUES, 1.0)):
        assert distance(other, best) > 0.05 or np.allclose(other, best)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "loss", "samples"), [("group", "sppo", 4), ("best_worst", "sppo_hard", 2)], ids=["group", "pair"]
)
def test_a_step_of_sppo_is_one_of_multiplicative_weights(pairs, loss, samples, arms):
    """log π_1 / π_0 = η (P(y ≻ π_0) − ½) + const, but for terms of order η²."""
    eta = 0.5
    changes = {
        "pairs": pairs,
        "loss": {"name": loss, "beta": 1 / eta},
        "prompts_per_step": 8192,
        "samples_per_prompt": samples,
        "epochs": 200,
        "optimizer": {"name": "adam", "learning_rate": 0.02, "max_grad_norm": None},
    }
    policy = arms_of(arms(changes, 1).policy)
    beats = (1 / (1 + np.exp(VALUES[None] - VALUES[:, None]))) @ ARMS
    ratio = np.log(policy / ARMS)
    step = eta * (beats - beats[0])
    assert np.ptp(step) > 0.2
    np.testing.assert_allclose(ratio - ratio[0], step, atol=0.02)


def spin(data, tmp_path, built, steps, start=None):
    """The distances of the policy to the data at the start and whenever the reference was renewed."""
    counts = np.round(1000 * data).astype(int)
    rows = [{"prompt": "0", "response": str(arm)} for arm in range(4) for _ in range(counts[arm])]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **ONLINE,
        "pairs": "example",
        "prompts_per_step": len(rows),
        "samples_per_prompt": 1,
        "sampler": {"max_new_tokens": 1},
        "references": {"previous": {"refresh_every_steps": 5}},
        "loss": {"name": "sigmoid", "beta": 0.5},
        "optimizer": {"name": "sgd", "learning_rate": 1.0, "max_grad_norm": None},
    }
    source = {"name": "jsonl", "train": str(tmp_path / "answers.jsonl"), "response_field": "response"}
    source["held_out"] = source["train"]
    experiment = built({"spin": settings}, steps, **BANDIT, data=source)
    state, distances = experiment.init(), []
    for step in range(steps):
        if step % 5 == 0:
            distances.append(distance(arms_of(state.policy), data))
        state = take_step(experiment, experiment.phases["spin"], state)
    return [*distances, distance(arms_of(jax.device_get(state.policy)), data)]


def test_spin_brings_the_policy_nearer_to_the_data_in_every_iteration(tmp_path, built):
    data = np.array([0.1, 0.2, 0.3, 0.4])
    distances = spin(data, tmp_path, built, 25)
    assert distances[0] == pytest.approx(0.4)
    assert (np.diff(distances) < 0).all()
    assert distances[-1] < 0.2


@pytest.mark.slow
def test_spin_ends_at_the_data_and_stays_there(tmp_path, built):
    assert spin(np.array([0.1, 0.2, 0.3, 0.4]), tmp_path, built, 400)[-1] < 0.02
    assert max(spin(ARMS, tmp_path, built, 40)) < 0.02
