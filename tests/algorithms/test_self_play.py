"""Self-play on games and distributions that can be enumerated, and shaping that leaves the optimum alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.self_play import (
    multiplicative_weights,
    preference_of_scores,
    spin_loss,
    sppo_loss,
    win_rate,
)
from hybrid_jax.algorithms.shaping import potential_shaping
from hybrid_jax.testing import (
    NUM_PREFIXES,
    SEQUENCES,
    objective,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)

DATA = np.array([0.1, 0.2, 0.3, 0.4])


def test_the_average_of_rock_paper_scissors_is_the_equilibrium():
    preference = jnp.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])

    def step(log_policy, _):
        return multiplicative_weights(log_policy, preference, 0.01), jnp.exp(log_policy)

    start = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    last, policies = jax.jit(lambda start: jax.lax.scan(step, start, None, 20_000))(start)
    np.testing.assert_allclose(policies.mean(0), 1 / 3, atol=0.01)
    assert np.abs(np.exp(last) - 1 / 3).max() > 0.1  # the last one circles


def spin_gradient(logits, opponent, data):
    """Expected gradient of the logits: every pair of a real and a generated text, by its probability."""

    def expected(logits):
        log_probs, theirs = jax.nn.log_softmax(logits), jnp.log(opponent)
        losses = spin_loss(log_probs[:, None], theirs[:, None], log_probs[None], theirs[None], beta=0.5)
        return jnp.sum(data[:, None] * opponent[None] * losses)

    return jax.grad(expected)(logits)


def test_spin_stands_still_where_the_opponent_is_the_data_and_only_there():
    with jax.enable_x64():
        data = jnp.asarray(DATA)
        np.testing.assert_allclose(spin_gradient(jnp.log(data), data, data), 0.0, atol=1e-17)
        assert np.abs(spin_gradient(jnp.zeros(4), jnp.full(4, 0.25), data)).max() > 1e-3


def test_spin_brings_the_policy_nearer_to_the_data_in_every_iteration():
    gradient = jax.jit(spin_gradient)
    logits, data, distances = jnp.zeros(4), jnp.asarray(DATA), []
    for _ in range(8):
        opponent = jax.nn.softmax(logits)
        distances.append(0.5 * float(jnp.abs(opponent - data).sum()))
        for _ in range(20):
            logits = logits - 0.5 * gradient(logits, opponent, data)
    assert (np.diff(distances) < 0).all()
    assert distances[-1] < 0.5 * distances[0]


def test_spin_is_its_formula():
    rows = np.random.default_rng(0).normal(size=(4, 5))
    got = spin_loss(*map(jnp.asarray, rows), beta=0.3)
    expected = [np.log(1 + np.exp(-0.3 * ((a - b) - (c - d)))) for a, b, c, d in rows.T]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    grads = jax.grad(lambda rows: spin_loss(*rows).sum())(jnp.asarray(rows))
    np.testing.assert_array_equal(np.asarray(grads)[[1, 3]], 0.0)  # the opponent is frozen


def test_the_minimum_of_sppo_is_the_win_rate_over_the_opponent():
    """log π_1/π_0 = η (P − ½) + const, for Bradley-Terry preferences."""
    scores, opponent = jnp.array([1.0, -0.5, 0.3, 2.0]), jnp.asarray(DATA)
    preference = preference_of_scores(scores[:, None], scores[None])
    beats = np.array([[1 / (1 + np.exp(b - a)) for b in scores.tolist()] for a in scores.tolist()]) @ DATA
    np.testing.assert_allclose(win_rate(preference, opponent), beats, rtol=1e-5)

    def expected(logits):
        losses = sppo_loss(jax.nn.log_softmax(logits), jnp.log(opponent), jnp.asarray(beats), eta=0.5)
        return jnp.sum(opponent * losses)

    gradient = jax.jit(jax.grad(expected))
    logits = jnp.log(opponent)
    for _ in range(2000):
        logits = logits - 0.5 * gradient(logits)
    # the regression carries no normaliser, so it is exact up to terms of order η²
    ratio = np.asarray(jax.nn.log_softmax(logits) - jnp.log(opponent))
    step = np.asarray(multiplicative_weights(jnp.log(opponent), preference, 0.5) - jnp.log(opponent))
    np.testing.assert_allclose(step - step[0], 0.5 * (beats - beats[0]), atol=1e-6)
    np.testing.assert_allclose(ratio - ratio[0], step - step[0], atol=5e-3)
    assert sppo_loss(jnp.array([0.3]), jnp.array([0.1]), jnp.array([0.9]), eta=0.5)[0] == pytest.approx(
        0.0, abs=1e-9
    )


def test_shaping_is_its_formula_and_skips_what_is_masked():
    potentials = jnp.array([[1.0, 9.0, 2.0, 4.0], [3.0, 5.0, jnp.nan, jnp.nan], [7.0, 7.0, 7.0, 7.0]])
    mask = jnp.array([[True, False, True, True], [True, True, False, False], [False] * 4])
    shaped = potential_shaping(potentials, mask, discount=0.5)
    np.testing.assert_allclose(shaped, [[0.0, 0.0, 0.0, -4.0], [-0.5, -5.0, 0.0, 0.0], [0.0] * 4])


def test_shaping_shifts_the_objective_by_the_first_potential_and_leaves_the_optimum():
    """On the 27-sequence model: J − J' = Φ(s_0) for every policy, so both have the same best one."""
    potential = np.random.default_rng(0).normal(size=NUM_PREFIXES).astype(np.float32)
    prefixes = np.stack([np.zeros(27, int), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], 1)
    shaped = potential_shaping(jnp.asarray(potential[prefixes]), jnp.ones((27, 3), bool))
    assert np.abs(np.asarray(shaped)).max() > 0.5
    reference, reward = sequence_probabilities(reference_params()), true_reward()
    other = reward + np.asarray(shaped, np.float64).sum(1)
    np.testing.assert_allclose(optimum(reference, other, 0.5), optimum(reference, reward, 0.5), atol=1e-6)
    for policy in (reference, optimum(reference, reward, 0.5), np.full(27, 1 / 27)):
        shift = objective(policy, reference, other, 0.5) - objective(policy, reference, reward, 0.5)
        assert shift == pytest.approx(-potential[0], abs=1e-6)
