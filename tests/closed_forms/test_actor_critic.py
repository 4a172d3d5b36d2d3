"""Actor-critic methods, from a config on, reach the closed form of KL-regularised reward on 27 responses."""

import numpy as np
import pytest

from hybrid_jax.testing import optimum, reference_params, sequence_probabilities, true_reward

BETA = 0.5
A2C = {"name": "a2c", "prompts_per_step": 128, "entropy_coef": 0.0}


def distance_to_optimum(policy):
    best = optimum(sequence_probabilities(reference_params()), true_reward(), BETA)
    return 0.5 * float(np.abs(policy - best).sum())


@pytest.mark.parametrize(
    "advantage",
    [{"name": "n_step"}, {"name": "n_step", "steps": 1}, {"name": "vtrace"}],
    ids=["all rewards", "values after one token", "vtrace"],
)
def test_a2c_reaches_the_optimum(advantage, learned, on_policy):
    policy = learned({"rl": {**on_policy, **A2C, "advantage": advantage}}, 200)
    assert distance_to_optimum(policy) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["n_step", "vtrace"])
def test_a3c_with_four_actors_reaches_the_optimum(advantage, learned, on_policy):
    settings = {**on_policy, **A2C, "name": "a3c", "actors": 4, "advantage": {"name": advantage}}
    assert distance_to_optimum(learned({"rl": settings}, 300)) < 0.02
