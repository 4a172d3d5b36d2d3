import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.meta import inner_step, meta_gradient, weight_gradient
from hybrid_jax.algorithms.policy_gradient import clipped_policy_loss


def half_square(params, target):
    return 0.5 * jnp.square(params - target)


def test_a_step_descends_every_leaf():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    stepped = inner_step(lambda p: (p["a"] ** 2).sum() + 5 * p["b"], params, 0.1)
    np.testing.assert_allclose(stepped["a"], [0.8, 1.6], rtol=1e-6)
    np.testing.assert_allclose(stepped["b"], 2.5, rtol=1e-6)


@pytest.mark.parametrize(("first_order", "expected"), [(False, -0.405), (True, -0.45)])
def test_two_parabolas_have_the_published_meta_gradient(first_order, expected):
    """θ = 1, α = .1, targets 0, 3: (θ′ − a)(1 − α) is .81 and −1.62; without the second order .9, −1.8."""
    found = meta_gradient(
        half_square, half_square, jnp.array(1.0), jnp.array([0.0, 3.0]), 0.1, first_order=first_order
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_tasks_may_hold_their_own_data_for_adapting_and_for_judging():
    tasks = {"inner": jnp.array([0.0, 3.0]), "outer": jnp.array([1.0, -1.0])}
    found = meta_gradient(
        lambda params, task: half_square(params, task["inner"]),
        lambda params, task: half_square(params, task["outer"]),
        jnp.array(1.0),
        tasks,
        0.1,
    )
    assert found == pytest.approx(((0.9 - 1.0) * 0.9 + (1.2 + 1.0) * 0.9) / 2, abs=1e-6)


TRUTH = np.array([0.0, 1.0, 2.0, -1.0])
REWARDS = np.stack([TRUTH, [1.0, 1.0, -1.0, -1.0]])  # the second has no correlation with the truth
START = np.array([0.5, 1.0])  # but four times the share in what is chosen: under these weights arm 1 is best


def expected_loss(scores, arms):
    return -jax.nn.softmax(scores) @ arms


def test_the_gradient_of_reward_weights_is_that_of_finite_differences():
    scores, rate = jnp.array([0.3, 0.6, -0.5, 0.1]), 0.5

    def inner(scores, weights):
        return expected_loss(scores, weights @ REWARDS)

    found = weight_gradient(inner, lambda scores: expected_loss(scores, TRUTH), scores, START, rate)

    def after(weights):  # by hand, in float64, with the derivative of a softmax written out
        policy, combined = softmax(np.asarray(scores, np.float64)), weights @ REWARDS
        moved = np.asarray(scores, np.float64) + rate * policy * (combined - policy @ combined)
        return -softmax(moved) @ TRUTH

    width = 1e-5
    steps = width * np.eye(2)
    differences = [(after(START + step) - after(START - step)) / (2 * width) for step in steps]
    np.testing.assert_allclose(found, differences, rtol=1e-3)
    assert np.abs(differences).min() > 1e-3


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def test_advantages_that_stop_gradients_leave_the_weights_without_any():
    def inner(scores, weights):
        return expected_loss(scores, jax.lax.stop_gradient(weights @ REWARDS))

    found = weight_gradient(
        inner, lambda scores: expected_loss(scores, TRUTH), jnp.array([0.3, -0.2, 0.1, 0.4]), START, 0.5
    )
    assert found.tolist() == [0.0, 0.0]


def surrogate(scores, arms, rewards):
    """The clipped loss on sampled arms; old log-probabilities and the sampling are those of ``scores``."""
    log_probs = jax.nn.log_softmax(scores)[arms][:, None]
    advantages = (rewards - rewards.mean())[:, None]
    old = jax.lax.stop_gradient(log_probs)
    mask = jnp.ones_like(log_probs, bool)
    return clipped_policy_loss(log_probs, old, advantages, mask, clip_range=0.2)[0].mean()


@pytest.fixture(scope="module")
def trained():
    """True return and weights at the end: of learnt weights, of the weights at the start, of the truth."""
    rate, rows, rewards, truth = 0.3, 256, jnp.asarray(REWARDS), jnp.asarray(TRUTH)

    def run(weights, weight_rate):
        def step(carry, key):
            scores, weights = carry
            inner_key, outer_key = jax.random.split(key)
            arms = jax.random.categorical(inner_key, scores, shape=(rows,))

            def inner(scores, weights):
                return surrogate(scores, arms, (weights @ rewards)[arms])

            def outer(scores):  # fresh arms, of the policy after the step
                arms = jax.random.categorical(outer_key, jax.lax.stop_gradient(scores), shape=(rows,))
                return surrogate(scores, arms, truth[arms])

            gradient = weight_gradient(inner, outer, scores, weights, rate)
            scores = inner_step(lambda scores: inner(scores, weights), scores, rate)
            return (scores, weights - weight_rate * gradient), None

        keys = jax.random.split(jax.random.key(0), 400)
        (scores, weights), _ = jax.lax.scan(step, (jnp.zeros(4), weights), keys)
        return jax.nn.softmax(scores) @ truth, weights

    start = jnp.array([START, START, [1.0, 0.0]])
    returns, weights = jax.jit(jax.vmap(run))(start, jnp.array([10.0, 0.0, 0.0]))
    return np.asarray(returns), np.asarray(weights)


def test_learnt_weights_drop_the_reward_that_does_not_serve_the_truth(trained):
    _, weights = trained
    assert weights[0, 1] <= 0.0 < 0.5 < weights[0, 0]


def test_learnt_weights_lead_where_the_truth_leads(trained):
    (learnt, fixed, truth), _ = trained
    assert truth > 1.95  # of 2
    assert learnt == pytest.approx(truth, rel=0.01)
    assert fixed < 1.2  # arm 1
