"""Preference losses: published numbers, probabilities that sum to one, and loops that share no code."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.preference import (
    centring_loss,
    pair_accuracy,
    pair_loss,
    plackett_luce_loss,
    ranking_loss,
    reward_margin,
)

# Games of the American League, 1987: row beats column; Milwaukee, Detroit, Toronto, New York, Boston,
# Cleveland, Baltimore (Agresti; the vignette of R's BradleyTerry2).
WINS = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)
ABILITIES = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0]
RANDOM = np.random.default_rng(0)


def two(better, worse):
    """Arguments of the losses for pairs, the better response second."""
    rewards = jnp.stack([jnp.asarray(worse), jnp.asarray(better)], axis=1)[..., None]
    ranks = jnp.tile(jnp.array([1, 0]), (len(rewards), 1))
    return rewards, ranks, jnp.ones(ranks.shape, bool), jnp.ones((len(rewards), 1))


def newton(loss, x, steps=12):
    """The minimum of a convex function of few numbers."""
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    for _ in range(steps):
        x = x - jnp.linalg.solve(hessian(x), gradient(x))
    return x


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_a_pair_has_its_published_loss_with_and_without_a_margin():
    pair = two([1.3], [0.4])
    loss = jax.jit(lambda margin: ranking_loss(*pair, margin).mean())
    assert float(loss(0.0)) == pytest.approx(0.3411539, abs=1e-6)
    assert float(loss(0.5)) == pytest.approx(0.5130152, abs=1e-6)


def baseball():
    """Our abilities and their loss: a season is 42 ordered pairs of teams, each as often as it was played."""
    games = [(i, j) for i, j in itertools.product(range(7), repeat=2) if i != j]
    winner, loser = np.array(games).T
    weights = jnp.asarray(WINS[winner, loser], jnp.float32)[:, None]

    def loss(free):
        abilities = jnp.append(free, 0.0)  # Baltimore is 0: only differences matter
        rewards, ranks, present, _ = two(abilities[winner], abilities[loser])
        return ranking_loss(rewards, ranks, present, weights).total

    found = newton(loss, jnp.zeros(6))
    return np.append(found, 0.0), float(loss(found))


def test_baseball_teams_get_their_published_abilities():
    abilities, loss = baseball()
    np.testing.assert_allclose(abilities, ABILITIES, atol=1e-4)  # printed with 4 digits
    assert loss == pytest.approx(172.24818, abs=2e-4)  # float32 of 172


@pytest.mark.slow  # choix imports much
def test_baseball_teams_get_the_abilities_of_choix():
    choix = pytest.importorskip("choix")
    theirs = choix.ilsr_pairwise_dense(WINS)
    np.testing.assert_allclose(baseball()[0], theirs - theirs[-1], atol=1e-4)


def test_linear_rewards_are_a_logistic_regression_on_differences_of_features():
    sklearn = pytest.importorskip("sklearn.linear_model")
    differences = RANDOM.normal(0, 1, (200, 5))
    won = RANDOM.random(200) < 1 / (1 + np.exp(-differences @ [1.0, -0.5, 0.3, 0.0, 2.0]))
    signs = np.where(won, 1.0, -1.0)[:, None]
    features = jnp.asarray(differences * signs, jnp.float32)  # better less worse

    def loss(kernel):
        ridge = 0.5 * jnp.sum(kernel**2)  # sklearn's, for C = 1
        return ranking_loss(*two(features @ kernel, jnp.zeros(200))).total + ridge

    theirs = sklearn.LogisticRegression(fit_intercept=False, tol=1e-8, max_iter=1000)
    theirs.fit(differences, won)
    np.testing.assert_allclose(newton(loss, jnp.zeros(5)), theirs.coef_[0], rtol=1e-4, atol=1e-5)


def test_all_pairs_of_a_prompt_are_one_element_of_the_batch():
    rewards, ranks = RANDOM.normal(0, 1, (3, 4, 2)), np.array([[2, 0, 1, 9], [0, 1, 9, 9], [1, 1, 0, 2]])
    present = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    weights, margins = RANDOM.integers(0, 3, (3, 2)), [0.3, 0.0, -0.2]
    total, centre = 0.0, 0.0
    for b, m in itertools.product(range(3), range(2)):
        losses, squares = [], []
        for i, j in itertools.combinations(np.flatnonzero(present[b]), 2):
            i, j = (i, j) if ranks[b, i] <= ranks[b, j] else (j, i)
            difference = rewards[b, i, m] - rewards[b, j, m]
            if ranks[b, i] == ranks[b, j]:
                losses.append(-(log_sigmoid(difference) + log_sigmoid(-difference)) / 2)
            else:
                losses.append(-log_sigmoid(difference - margins[b]))
            squares.append((rewards[b, i, m] + rewards[b, j, m]) ** 2)
        total += weights[b, m] * np.mean(losses)
        centre += weights[b, m] * np.mean(squares)
    garbage = jnp.asarray(np.where(present[..., None], rewards, np.nan), jnp.float32)
    inputs = (garbage, jnp.asarray(ranks), jnp.asarray(present), jnp.asarray(weights, jnp.float32))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def both(rewards):
        sums = ranking_loss(rewards, *inputs[1:], jnp.asarray(margins)), centring_loss(rewards, *inputs[1:])
        return sums[0].total + sums[1].total, sums

    gradient, (loss, centring) = both(garbage)
    assert float(loss.total) == pytest.approx(total, rel=1e-5)
    assert float(loss.weight) == weights.sum()
    assert float(centring.total) == pytest.approx(centre, rel=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7])
def test_win_defeat_and_tie_of_rao_and_kupper_sum_to_one(difference):
    theta, p, q = math.exp(0.4), math.exp(difference), 1.0  # their symbols: strengths p and q
    known = [p / (p + theta * q), q / (theta * p + q)]
    known.append((theta**2 - 1) * p * q / ((p + theta * q) * (theta * p + q)))
    assert sum(known) == pytest.approx(1.0)
    losses = [
        pair_loss(jnp.float32(difference), tie_threshold=0.4),
        pair_loss(jnp.float32(-difference), tie_threshold=0.4),
        pair_loss(jnp.float32(difference), True, tie_threshold=0.4),
    ]
    np.testing.assert_allclose(np.exp(-np.array(losses)), known, rtol=1e-5)


def test_a_tie_without_a_threshold_is_half_a_win_of_either_side():
    assert float(pair_loss(jnp.float32(0.0), True)) == pytest.approx(math.log(2))
    expected = -(log_sigmoid(0.9) + log_sigmoid(-0.9)) / 2
    assert float(pair_loss(jnp.float32(0.9), True)) == pytest.approx(expected, rel=1e-6)


def test_ties_are_not_smoothed():
    for threshold in (None, 0.5):
        tie, smoothed = (
            float(pair_loss(jnp.float32(0.9), True, label_smoothing=e, tie_threshold=threshold))
            for e in (0.0, 0.3)
        )
        assert tie == smoothed


def test_smoothed_labels_stop_at_the_log_odds_of_their_noise():
    loss = lambda d: pair_loss(d, label_smoothing=0.1)  # noqa: E731
    assert float(loss(jnp.float32(0.9))) == pytest.approx(-0.9 * log_sigmoid(0.9) - 0.1 * log_sigmoid(-0.9))
    assert float(jax.grad(loss)(jnp.float32(math.log(9)))) == pytest.approx(0.0, abs=1e-6)


def test_plackett_luce_chooses_the_best_of_what_is_left():
    rewards, ranks = jnp.array([[[0.5], [2.0], [-1.0], [jnp.nan]]]), jnp.array([[1, 0, 2, 0]])
    present, ones = jnp.array([[True, True, True, False]]), jnp.ones((1, 1))
    e = math.exp
    expected = -math.log(e(2) / (e(2) + e(0.5) + e(-1))) - math.log(e(0.5) / (e(0.5) + e(-1)))
    loss = jax.jit(jax.value_and_grad(lambda r: plackett_luce_loss(r, ranks, present, ones).total))
    found, gradient = loss(rewards)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(gradient).all()
    pair = two([1.3, -0.2], [0.4, 0.7])
    of_pair = jax.jit(lambda *pair: (plackett_luce_loss(*pair).total, ranking_loss(*pair).total))(*pair)
    assert float(of_pair[0]) == pytest.approx(float(of_pair[1]), rel=1e-6)


def test_plackett_luce_gives_all_rankings_together_the_probability_one():
    rewards, present, ones = jnp.array([[[0.3], [-1.0], [1.7]]]), jnp.ones((1, 3), bool), jnp.ones((1, 1))
    loss = jax.jit(lambda order: plackett_luce_loss(rewards, order, present, ones).total)
    total = sum(math.exp(-loss(jnp.array([order]))) for order in itertools.permutations(range(3)))
    assert total == pytest.approx(1.0, rel=1e-5)


def test_accuracy_counts_equal_rewards_one_half_and_leaves_ties_out():
    rewards = jnp.array([[1.0, 2.0, jnp.nan], [0.0, 0.0, 3.0]])
    ranks, present = jnp.array([[1, 0, 0], [0, 1, 1]]), jnp.array([[True, True, False], [True] * 3])
    found = jax.jit(pair_accuracy)(rewards, ranks, present)  # right; equal, wrong; the tie is left out
    assert (float(found.total), float(found.weight)) == (1.5, 3.0)
    margin = jax.jit(reward_margin)(rewards, ranks, present)
    assert float(margin.total) == pytest.approx(1.0 + 0.0 - 3.0)
