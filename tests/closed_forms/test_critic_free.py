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
BANDIT = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, -1.0])  # π_ref and the rewards of four arms


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def own_kl(reference: np.ndarray, expected: np.ndarray, beta: float = BETA) -> np.ndarray:
    """argmax of π·Q − β KL(π ‖ π_ref) over one token."""
    weights = reference * np.exp(expected / beta)
    return weights / weights.sum()


def own_reversed_kl(reference: np.ndarray, expected: np.ndarray, beta: float = BETA) -> np.ndarray:
    """argmax of π·Q − β KL(π_ref ‖ π) over one token, π = β π_ref / (λ − Q)."""

    def policy(level: float) -> np.ndarray:
        return beta * reference / (level - expected)

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
    assert own_kl(*BANDIT) == pytest.approx([0.029521, 0.163597, 0.805884, 0.000999], abs=1e-6)
    assert own_reversed_kl(*BANDIT) == pytest.approx([0.09381, 0.132512, 0.757714, 0.015964], abs=1e-6)
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    own, reversed_ = token_by_token(own_kl), token_by_token(own_reversed_kl)
    assert [distance(best, own), distance(own, reversed_)] == pytest.approx([0.0247895, 0.1717689], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_REWARD)
def test_a_method_reaches_the_optimum_of_the_kl_in_the_reward(name, learned, on_policy):
    settings = {**on_policy, "prompts_per_step": 64, "samples_per_prompt": 8, **BY_REWARD[name]}
    policy = learned({"rl": {"name": name, **settings}}, 300)
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    assert distance(policy, best) < 0.01


@pytest.mark.slow
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


@pytest.fixture
def arms(trained, on_policy):
    """``arms(settings)`` trains GRPO on the bandit and returns π of its four arms."""

    def run(**changes) -> np.ndarray:
        settings = {
            **on_policy,
            "sampler": {"max_new_tokens": 1},
            "reward": {
                "parts": {"arm": {"reward": {"name": "token_count", "weights": {1: 1.0, 2: 2.0, 3: -1.0}}}}
            },
            "optimizer": {**on_policy["optimizer"], "learning_rate": 0.2},
            "prompts_per_step": 4,
            "samples_per_prompt": 512,
            **UNSCALED,
            **changes,
        }
        bandit = {"model": "worlds:Bandit", "tokenizer": {"name": "worlds:Digits", "count": 4}}
        scores = np.asarray(trained({"rl": {"name": "grpo", **settings}}, 60, **bandit).policy["table"], float)[
            0
        ]
        return np.exp(scores) / np.exp(scores).sum()

    return run


@pytest.mark.parametrize(
    "kl_penalty",
    ["k3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("k3_ratio", "reward", "k2"))],
)
def test_grpo_on_a_bandit_reaches_the_optimum_of_where_its_kl_is_counted(kl_penalty, arms):
    best = (own_reversed_kl if kl_penalty == "k3" else own_kl)(*BANDIT)
    assert distance(arms(kl_penalty=kl_penalty), best) < 0.02  # the two optima are 0.08 apart


@pytest.mark.slow
def test_in_a_pair_the_own_reward_in_the_baseline_doubles_a_kl_in_the_loss(arms):
    pairs = {"advantage": {"name": "group", "scale": "none"}, "prompts_per_step": 1024, "samples_per_prompt": 2}
    policy = arms(kl_penalty="k3", **pairs)
    single, double = own_reversed_kl(*BANDIT), own_reversed_kl(*BANDIT, beta=2 * BETA)
    assert distance(single, double) > 0.1
    assert distance(policy, double) < 0.02


def test_distillation_brings_any_policy_back_to_its_teacher(learned, on_policy, tmp_path):
    """The teacher is the policy at the start; the first phase leaves it, and the second returns."""
    shared = {**on_policy, "prompts_per_step": 4, "samples_per_prompt": 128}
    teacher = {"teacher": {"frozen_at": "start"}}
    away = {"name": "rloo", **shared, "references": {}}
    back = {"name": "distillation", **shared, "references": teacher, "kl_control": {"coef": 1.0}}
    del back["reward"]
    start = sequence_probabilities(reference_params())
    left, phases = (
        {"name": "alternation", "warmup": {"away": 20}, "cycle": {"back": 1}},
        {"away": away, "back": back},
    )
    assert distance(learned({"away": away}, 20, run_dir=str(tmp_path / "away")), start) > 0.3
    assert distance(learned(phases, 100, scheduler=left), start) < 0.005
