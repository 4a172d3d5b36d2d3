"""Preferences, from a config on: the closed forms of 27 responses, and the loss of a bandit."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.preference_losses import Sigmoid
from hybrid_jax.testing import SEQUENCES, optimum, reference_params, sequence_probabilities, true_reward

BETA = 1.5
REFERENCE = sequence_probabilities(reference_params())
# A row is the prompt and three tokens: the end token, which nothing can choose here, is cut from both sides.
SETTINGS = {"name": "preference", "length": 4, "long_rows": "truncate_end", "dropout": False}
ADAM = {"name": "adam", "schedule": "linear", "max_grad_norm": None}


def distance(p, q):
    return 0.5 * float(np.abs(p - q).sum())


def text(sequence):
    return "".join(map(str, sequence))


def rows_of(preferred, copies):
    """All pairs of responses, each ``copies`` times, of which the share P(i beats j) says that i is better."""
    rows = []
    for i, j in itertools.combinations(range(len(SEQUENCES)), 2):
        wins = round(copies * preferred(i, j))
        for winner, loser, count in ((i, j, wins), (j, i, copies - wins)):
            row = {"prompt": "0", "chosen": text(SEQUENCES[winner]), "rejected": text(SEQUENCES[loser])}
            rows += [row] * count
    return rows


@pytest.fixture
def taught(tmp_path, learned):
    """``taught(rows, settings, steps)`` learns from those preferences and returns π of the 27 responses."""

    def run(rows, settings, steps):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"name": "jsonl", "train": str(tmp_path / "pairs.jsonl")}
        return learned({"preference": {**SETTINGS, "source": source, **settings}}, steps)

    return run


def test_dpo_on_bradley_terry_labels_reaches_the_optimum_of_rl(taught):
    # Votes of 20 are off by 0.025 at most; over 351 pairs that evens out.
    reward = true_reward() / BETA
    rows = rows_of(lambda i, j: 1 / (1 + np.exp(reward[j] - reward[i])), 20)
    settings = {
        "batch_size": len(rows),
        "loss": {"name": "sigmoid", "beta": 1.0},
        "optimizer": {**ADAM, "learning_rate": 0.1},
    }
    policy = taught(rows, settings, 60)
    best = optimum(REFERENCE, true_reward(), BETA)
    assert distance(policy, best) < 0.01
    assert distance(REFERENCE, best) > 0.15


def rewards_of(rows):
    """The rewards under which the votes are likeliest (Bradley-Terry), with mean 0, by Newton's method."""
    number = {text(sequence): i for i, sequence in enumerate(SEQUENCES)}
    better, worse = (np.array([number[row[side]] for row in rows]) for side in ("chosen", "rejected"))
    rewards, eye = np.zeros(len(SEQUENCES)), np.eye(len(SEQUENCES))
    signs = eye[better] - eye[worse]
    for _ in range(50):
        wrong = 1 / (1 + np.exp(signs @ rewards))
        slope, bend = signs.T @ wrong, (signs * (wrong * (1 - wrong))[:, None]).T @ signs
        rewards = rewards + np.linalg.lstsq(bend, slope, rcond=None)[0]
    assert np.abs(slope).max() < 1e-9
    return rewards


def test_above_several_references_dpo_reaches_their_geometric_mean_times_what_the_votes_say(
    trained, on_policy, tmp_path
):
    rows = rows_of(lambda i, j: 1 / (1 + np.exp(true_reward()[j] - true_reward()[i])), 4)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The first is the policy that the run begins with, the second what RLOO has made of it.
    references = {
        "begun": {"weight": 0.8, "frozen_at": "start"},
        "moved": {"weight": 1.2, "frozen_at": "first_step"},
    }
    preference = {
        **SETTINGS,
        "source": {"name": "jsonl", "train": str(tmp_path / "pairs.jsonl")},
        "batch_size": len(rows),
        "loss": {"name": "sigmoid", "beta": 0.5},
        "references": references,
        "optimizer": {**ADAM, "learning_rate": 0.2},
    }
    rl = {"name": "rloo", "prompts_per_step": 16, **on_policy}
    state = trained(
        {"rl": rl, "preference": preference},
        210,
        scheduler={"name": "alternation", "warmup": {"rl": 10}, "cycle": {"preference": 1}},
    )
    begun, moved = (sequence_probabilities(state.references[f"preference/{name}"]) for name in references)
    assert distance(begun, REFERENCE) < 1e-6
    assert distance(begun, moved) > 0.1
    best = optimum(begun**0.4 * moved**0.6, rewards_of(rows), 0.5)
    assert distance(sequence_probabilities(state.policy), best) < 2e-3
    assert distance(optimum(begun, rewards_of(rows), 0.5), best) > 0.02


def test_ipo_on_certain_preferences_reaches_its_own_margin(taught):
    # One pair, of which the one is always better: h = 1 / (2β).
    rows = [{"prompt": "0", "chosen": "222", "rejected": "100"}] * 4
    settings = {
        "batch_size": 4,
        "loss": {"name": "ipo", "beta": 0.25},
        "optimizer": {**ADAM, "learning_rate": 0.1},
    }
    policy = taught(rows, settings, 200)
    better, worse = (next(i for i, s in enumerate(SEQUENCES) if text(s) == name) for name in ("222", "100"))
    h = np.log(policy[better] / REFERENCE[better]) - np.log(policy[worse] / REFERENCE[worse])
    assert h == pytest.approx(2.0, abs=1e-3)


def test_the_mean_loss_over_the_pairs_of_a_bandit_is_the_published_one():
    reference, reward, beta = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, -1.0]), 0.5
    loss = Sigmoid(beta=beta)

    def mean_loss(policy):
        total = 0.0
        for i, j in itertools.permutations(range(4), 2):
            wins = 1 / (1 + np.exp(reward[j] - reward[i]))
            logs = [jnp.log(jnp.asarray([[p[i], p[j]]])) for p in (policy, reference)]
            total += wins * float(loss(logs[0], logs[1], jnp.ones((1, 2)))[0]) / 6
        return total

    assert mean_loss(optimum(reference, reward, beta)) == pytest.approx(0.4446903, abs=1e-6)
    assert mean_loss(reference) == pytest.approx(np.log(2), abs=1e-6)
