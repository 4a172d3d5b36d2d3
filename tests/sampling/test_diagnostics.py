"""Diagnostics of chains and particles, against closed forms and hand numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.diagnostics import (
    autocorrelation_time,
    effective_number,
    r_hat_of_prompts,
    split_r_hat,
)
from hybrid_jax.sampling.metropolis import Metropolis
from hybrid_jax.sampling.particles import Particles
from hybrid_jax.testing import PrefixTable, reference_params


def autoregressive(rho, steps, chains, seed=0):
    """x_t = ρ x_{t−1} + noise, from its stationary law."""
    noise = np.random.default_rng(seed).normal(0, 1, (steps, chains))
    series = noise.copy()
    series[0] /= np.sqrt(1 - rho**2)
    for t in range(1, steps):
        series[t] += rho * series[t - 1]
    return series


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, -0.3])
def test_the_autocorrelation_time_of_an_autoregressive_chain_is_known(rho):
    found = autocorrelation_time(autoregressive(rho, 20_000, 8))
    assert found == pytest.approx((1 + rho) / (1 - rho), rel=0.06)


def test_chains_that_never_change_do_not_count():
    moving, still = autoregressive(0.5, 5000, 4), np.ones((5000, 4))
    assert autocorrelation_time(np.concatenate([moving, still], 1)) == autocorrelation_time(moving)
    assert autocorrelation_time(still) == math.inf
    assert math.isnan(autocorrelation_time(still[:1]))


def test_split_r_hat_by_hand():
    """Halves [1 2] [2 3] [3 4] [4 5]: within ½, the means 1.5 2.5 3.5 4.5 vary by 5/3, so R̂² = ½ + (5/3)/½."""
    chains = np.array([[1, 2], [2, 3], [3, 4], [4, 5]])
    assert split_r_hat(chains) == pytest.approx(math.sqrt(0.5 + 10 / 3))
    assert split_r_hat(np.ones((8, 2))) == 1
    assert split_r_hat(np.array([[1.0, 2.0]] * 8)) == math.inf
    assert math.isnan(split_r_hat(np.ones((3, 2))))
    assert split_r_hat(autoregressive(0.5, 20_000, 4)) == pytest.approx(1, abs=2e-3)


def test_chains_are_compared_with_those_of_the_same_prompt():
    near, far = autoregressive(0.0, 1000, 2), np.array([0.0, 10.0]) + autoregressive(0.0, 1000, 2, seed=1)
    prompts = np.array([[1, 2], [3, 4], [1, 2], [3, 4]])
    series = np.stack([near[:, 0], far[:, 0], near[:, 1], far[:, 1]], axis=1)
    assert r_hat_of_prompts(series, prompts) == pytest.approx(split_r_hat(far))
    assert split_r_hat(far) > 3 > split_r_hat(near)
    assert r_hat_of_prompts(series, np.arange(8).reshape(4, 2)) is None


def test_the_effective_number_by_hand():
    weights = jnp.log(jnp.array([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])) + 7
    np.testing.assert_allclose(effective_number(weights), [16 / 6, 3, 1], rtol=1e-6)


def test_the_log_says_what_chains_and_particles_did(caplog):
    """Each answer has 3 tokens: the first draw and 10 proposals read 33 for it, 8 particles draw 24."""
    caplog.set_level("INFO")
    prompts = jnp.zeros((6, 1), jnp.int32)
    inputs = (PrefixTable(), reference_params(), prompts, prompts == 0, jax.random.key(0))
    reward = TokenCount(weights={2: 1.0})
    sample(Metropolis(max_new_tokens=3, moves=10, reward=reward), *inputs)
    sample(Particles(max_new_tokens=3, n=8, reward=reward, resample_below=0.0), *inputs)
    chains, constant, particles = (record.getMessage() for record in caplog.records)
    assert "of 10 moves were taken, autocorrelation time" in chains
    assert "split R-hat" in chains
    assert chains.endswith("11 tokens read for one in an answer")
    assert "log Z is about" in constant
    assert particles.endswith("of 8 are effective at the end, 8 tokens drawn for one in an answer")
