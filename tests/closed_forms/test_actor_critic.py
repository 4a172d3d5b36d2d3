"""Actor-critic methods, from a config on, reach the closed form of KL-regularised reward on 27 responses."""

import jax
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"advantage": {"name": "vtrace", "rho_cap": 2.0, "trace_cap": 2.0}},
        {"advantage": {"name": "n_step"}, "correction": {"kind": "sequence_mask", "cap": 8.0}},
    ],
    ids=["vtrace", "sequence_mask"],
)
def test_what_an_exploring_policy_draws_teaches_the_optimum_of_the_policy_itself(changes, learned, on_policy):
    """A third of the tokens repeat the one before; ratios are at most 1.5, so that no cap cuts one."""
    sampler = {"name": "exploring", "max_new_tokens": 3, "share": 1 / 3, "repeat": 1.0}
    policy = learned({"rl": {**on_policy, **A2C, **changes, "sampler": sampler}}, 200)
    assert distance_to_optimum(policy) < 0.01


def test_the_kl_of_an_exploring_policy_is_its_own(built, on_policy):
    """Before the first update the policy is its reference: it is led astray and has not moved."""
    sampler = {"name": "exploring", "max_new_tokens": 3, "share": 0.5, "repeat": 1.0}
    changes = {"advantage": {"name": "vtrace", "rho_cap": 2.0, "trace_cap": 2.0}, "sampler": sampler}
    experiment = built({"rl": {**on_policy, **A2C, **changes}}, 1)
    _, metrics = experiment.phases["rl"].step(experiment.init(), jax.random.key(0))
    assert float(metrics["rl/kl"]) == pytest.approx(0, abs=1e-5)
    # The entropy of a token of the chain of π_ref, an expectation over draws of another law.
    reference = sequence_probabilities(reference_params())
    expected = -(reference @ np.log(reference)) / 3
    assert float(metrics["rl/entropy"]) == pytest.approx(
        expected, abs=0.12
    )  # four standard errors of 384 tokens
