"""Critic-free methods, from a config on, reach the closed forms of KL-regularised reward on 27 responses."""

import numpy as np
import pytest

from hybrid_jax.testing import optimum, reference_params, sequence_probabilities, true_reward


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - q).sum())


@pytest.mark.parametrize("name", ["rloo"])
def test_a_method_reaches_the_optimum_of_the_kl_in_the_reward(name, learned, on_policy):
    policy = learned({"rl": {"name": name, "prompts_per_step": 128, **on_policy}}, 300)
    best = optimum(sequence_probabilities(reference_params()), true_reward(), 0.5)
    assert distance(policy, best) < 0.02
