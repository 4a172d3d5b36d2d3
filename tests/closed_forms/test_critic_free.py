"""Critic-free methods, from a config on, reach the closed forms of KL-regularised reward on 27 responses."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import brentq

from hybrid_jax.testing import (
    SEQUENCES,
    START,
    TRANSITION,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)

BETA = 0.5
UNSCALED = {"advantage": "leave_one_out", "kl_control": {"coef": BETA}}
BY_REWARD = {
    "rloo": {},
    "reinforce": {},
    "dr_grpo": {"references": {"sft": {}}},
    "cispo": {**UNSCALED, "references": {"sft": {}}},
    "gspo": {**UNSCALED, "references": {"sft": {}}, "ratio": "sequence_token"},
}
BY_LOSS = ("k2", "k3", "k3_ratio")


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def own_kl(reference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """argmax of π·Q − β KL(π ‖ π_ref) over one token."""
    weights = reference * np.exp(expected / BETA)
    return weights / weights.sum()


def own_reversed_kl(reference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """argmax of π·Q − β KL(π_ref ‖ π) over one token, π = β π_ref / (λ − Q)."""

    def policy(level: float) -> np.ndarray:
        return BETA * reference / (level - expected)

    least = float(expected.max())
    return policy(brentq(lambda level: policy(level).sum() - 1, least + 1e-12, least + 100))


def token_by_token(best: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """π of the 27 responses where each token weighs the score to be expected against its own KL alone."""
    reward = dict(zip(map(tuple, SEQUENCES), true_reward(), strict=True))
    probabilities = {}

    def solve(prefix: tuple[int, ...]) -> float:
        """The score to be expected from a prefix on; fills in the choices that follow it."""
        if len(prefix) == 3:
            return reward[prefix]
        expected = np.array([solve((*prefix, token)) for token in range(3)])
        probabilities[prefix] = best(TRANSITION[prefix[-1]] if prefix else START, expected)
        return float(probabilities[prefix] @ expected)

    solve(())
    return np.array([np.prod([probabilities[tuple(s[:t])][s[t]] for t in range(3)]) for s in SEQUENCES])


def test_the_optima_are_the_published_ones_and_far_apart():
    bandit = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, -1.0])
    assert own_kl(*bandit) == pytest.approx([0.029521, 0.163597, 0.805884, 0.000999], abs=1e-6)
    assert own_reversed_kl(*bandit) == pytest.approx([0.09381, 0.132512, 0.757714, 0.015964], abs=1e-6)
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    own, reversed_ = token_by_token(own_kl), token_by_token(own_reversed_kl)
    assert [distance(best, own), distance(own, reversed_)] == pytest.approx([0.0247895, 0.1717689], abs=1e-6)


@pytest.mark.parametrize("name", BY_REWARD)
def test_a_method_reaches_the_optimum_of_the_kl_in_the_reward(name, learned, on_policy):
    settings = {**on_policy, "prompts_per_step": 64, "samples_per_prompt": 8, **BY_REWARD[name]}
    policy = learned({"rl": {"name": name, **settings}}, 300)
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    assert distance(policy, best) < 0.01


@pytest.mark.parametrize("kl_penalty", BY_LOSS)
def test_a_kl_in_the_loss_reaches_the_optimum_of_its_estimator(kl_penalty, learned, on_policy):
    # The noise of a loss does not vanish at its optimum, as that of a KL in the reward does: more rows.
    settings = {
        **on_policy,
        **UNSCALED,
        "prompts_per_step": 512,
        "samples_per_prompt": 8,
        "kl_penalty": kl_penalty,
    }
    policy = learned({"rl": {"name": "grpo", **settings}}, 300)
    expected = token_by_token(own_reversed_kl if kl_penalty == "k3" else own_kl)
    assert distance(policy, expected) < 0.01
