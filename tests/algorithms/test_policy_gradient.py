"""The losses of PPO: published vectors, float64 loops, and where a KL penalty leads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl import k1, k2, k3, token_rewards
from hybrid_jax.algorithms.log_probs import token_log_probs
from hybrid_jax.algorithms.policy_gradient import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    policy_change,
)

RANDOM = np.random.default_rng(0)
MASK = RANDOM.random((4, 8)) < 0.6
LOG_PROBS, OLD = -1 + 0.3 * RANDOM.normal(0, 1, (2, 4, 8))
ADVANTAGES = RANDOM.normal(0, 1, (4, 8))


def policy_loop(log_probs, epsilon):
    """Cases instead of min and max: the gain is capped only where the step was already an improvement."""
    loss, metrics = 0.0, {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio": 0.0}
    for b, t in zip(*np.nonzero(MASK), strict=True):
        ratio, advantage = np.exp(log_probs[b, t] - OLD[b, t]), ADVANTAGES[b, t]
        if advantage > 0 and ratio > 1 + epsilon:
            used = 1 + epsilon
        elif advantage < 0 and ratio < 1 - epsilon:
            used = 1 - epsilon
        else:
            used = ratio
        loss -= used * advantage
        metrics["clip_fraction"] += used != ratio
        metrics["approx_kl"] += (ratio - 1) - np.log(ratio)
        metrics["ratio"] += ratio
    return loss, metrics


def value_loop(values, old, returns, epsilon):
    loss, clipped_items = 0.0, 0
    for b, t in zip(*np.nonzero(MASK), strict=True):
        plain = (values[b, t] - returns[b, t]) ** 2
        near = plain
        if epsilon is not None:
            near = (min(max(values[b, t], old[b, t] - epsilon), old[b, t] + epsilon) - returns[b, t]) ** 2
        loss += 0.5 * max(plain, near)
        clipped_items += near > plain
    return loss, clipped_items


def slopes(function, x, step=1e-6):
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        result[index] = (function(up) - function(down)) / (2 * step)
    return result


def with_garbage(*arrays):
    return [jnp.asarray(np.where(MASK, array, np.nan), jnp.float32) for array in arrays]


def test_the_clipped_surrogate_reproduces_the_vectors_of_rlax():
    logits = jnp.array([[1.0, 1, 1], [2, 0, 0], [-1, -2, -3]])
    old_logits = jnp.array([[1.0, 1, 1], [2, 0, 0], [-3, -2, -1]])
    actions, mask = jnp.array([0, 1, 2]), jnp.ones(3, bool)
    log_probs, old = token_log_probs(logits, actions), token_log_probs(old_logits, actions)
    # Theirs are rounded (tested to 1e-4). Derived: ratios 1, 1, e⁻²; the last is clipped to 0.8 where A < 0.
    for sign, vector, exact in ((1, -0.17117467, -(0.5 + 0.1 * np.exp(-2)) / 3), (-1, 0.19333333, 0.58 / 3)):
        advantages = sign * jnp.array([0.3, 0.2, 0.1])
        loss, _ = clipped_policy_loss(log_probs, old, advantages, mask, clip_range=0.2)
        assert float(loss.mean()) == pytest.approx(vector, abs=1e-4)
        assert float(loss.mean()) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.2, 0.05])
def test_the_policy_loss_equals_a_loop_over_cases_with_its_gradient(epsilon):
    log_probs, old, advantages = with_garbage(LOG_PROBS, OLD, ADVANTAGES)

    def loss(log_probs):
        found, metrics = clipped_policy_loss(log_probs, old, advantages, jnp.array(MASK), clip_range=epsilon)
        return found.total, (found, metrics | policy_change(log_probs, old, jnp.array(MASK)))

    (_, (found, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(log_probs)
    expected, expected_metrics = policy_loop(LOG_PROBS, epsilon)
    assert expected_metrics["clip_fraction"] > 2
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    assert {name: float(metric.total) for name, metric in metrics.items()} == pytest.approx(
        expected_metrics, rel=1e-5
    )
    assert {float(metric.weight) for metric in (found, *metrics.values())} == {MASK.sum()}
    np.testing.assert_allclose(gradient, slopes(lambda x: policy_loop(x, epsilon)[0], LOG_PROBS), atol=1e-5)


def test_on_policy_the_ratio_is_one_and_the_gradient_that_of_reinforce():
    log_probs, advantages = with_garbage(LOG_PROBS, ADVANTAGES)

    def loss(x):
        return clipped_policy_loss(x, log_probs, advantages, jnp.array(MASK), clip_range=0.2)[0].total

    np.testing.assert_allclose(jax.grad(loss)(log_probs), np.where(MASK, -ADVANTAGES, 0.0), rtol=1e-6)
    _, metrics = clipped_policy_loss(log_probs, log_probs, advantages, jnp.array(MASK), clip_range=0.2)
    metrics |= policy_change(log_probs, log_probs, jnp.array(MASK))
    assert [float(metrics[name].mean()) for name in ("ratio", "approx_kl", "clip_fraction")] == [
        1.0,
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("epsilon", [0.2, None])
def test_the_value_loss_equals_a_loop_with_its_gradient(epsilon):
    values, old, returns = LOG_PROBS, OLD, ADVANTAGES
    given = with_garbage(values, old, returns)

    def loss(x):
        found, metrics = clipped_value_loss(x, *given[1:], jnp.array(MASK), clip_range=epsilon)
        return found.total, (found, metrics)

    (_, (found, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(given[0])
    expected, clipped_items = value_loop(values, old, returns, epsilon)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    assert float(found.weight) == MASK.sum()
    assert (float(metrics["value_clip_fraction"].total), clipped_items > 0) == (
        clipped_items,
        epsilon is not None,
    )
    expected = slopes(lambda x: value_loop(x, old, returns, epsilon)[0], values)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_what_is_masked_gets_no_gradient_whatever_stands_there():
    given, mask = with_garbage(LOG_PROBS, OLD, ADVANTAGES), jnp.array(MASK)
    for loss in (clipped_policy_loss, clipped_value_loss):
        total = lambda x, loss=loss: loss(x, *given[1:], mask, clip_range=0.2)[0].total  # noqa: E731
        gradient = np.asarray(jax.grad(total)(given[0]))
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[~MASK], 0.0)
        assert (gradient[MASK] != 0).any()


def test_more_padding_changes_no_loss():
    given = with_garbage(LOG_PROBS, OLD, ADVANTAGES)
    longer = [jnp.pad(x, ((0, 2), (1, 3)), constant_values=jnp.nan) for x in given]
    mask, longer_mask = jnp.array(MASK), jnp.pad(jnp.array(MASK), ((0, 2), (1, 3)))
    for loss in (clipped_policy_loss, clipped_value_loss):
        short, short_metrics = loss(*given, mask, clip_range=0.2)
        long, long_metrics = loss(*longer, longer_mask, clip_range=0.2)
        for a, b in zip(
            jax.tree.leaves((short, short_metrics)), jax.tree.leaves((long, long_metrics)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)  # the same items, summed in another order


def test_explained_variance_of_perfect_constant_and_worse_values():
    returns = jnp.array([1.0, 2.0, 3.0, jnp.nan])
    mask = jnp.array([True, True, True, False])
    assert float(explained_variance(returns + 5.0, returns, mask)) == pytest.approx(
        1.0
    )  # a bias is not variance
    assert float(explained_variance(jnp.full(4, 9.0), returns, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3.0, rel=1e-6)
    assert float(explained_variance(jnp.arange(4.0), jnp.ones(4), mask)) == 0.0


# A bandit with four actions: the optimum of E[r] − β KL(π ‖ π_ref) is π_ref exp(r/β), normalised.
REFERENCE, SCORES, BETA = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.array([0.0, 1.0, 2.0, -1.0]), 0.5
OPTIMUM = np.array([0.029521, 0.163597, 0.805884, 0.000999])


def solve_bandit(reward_kl, loss_kl):
    """Natural gradient with exact expectations (each action weighted by its probability) to convergence."""
    actions, mask = jnp.arange(4), jnp.ones((4, 1), bool)
    reference = jnp.log(REFERENCE)

    def loss(logits):
        log_probs = token_log_probs(jnp.broadcast_to(logits, (4, 4)), actions)[:, None]
        old = jax.lax.stop_gradient(log_probs)
        rewards = token_rewards(
            SCORES, old, {"sft": reference[:, None]}, {"sft": 1.0}, BETA if reward_kl else 0.0, mask
        )
        surrogate, _ = clipped_policy_loss(log_probs, old, jnp.exp(old) * rewards, mask, clip_range=0.2)
        penalty = jnp.exp(old) * loss_kl(log_probs, reference[:, None]) if loss_kl else 0.0
        return surrogate.total + BETA * jnp.sum(penalty)

    def step(logits, _):
        natural = jax.grad(loss)(logits) / jnp.maximum(jax.nn.softmax(logits), 1e-9)
        return logits - 0.05 * natural, None

    return np.asarray(jax.nn.softmax(jax.lax.scan(step, reference, length=2000)[0]))


@pytest.mark.parametrize(
    ("reward_kl", "loss_kl", "expected"),
    [
        (True, None, OPTIMUM),
        (False, k2, OPTIMUM),
        (False, k1, [0.0, 0.0, 1.0, 0.0]),  # its expected gradient is 0: no regularisation at all
        (False, k3, [0.09381, 0.13251, 0.75771, 0.01596]),  # the optimum of the forward KL
    ],
    ids=["k1 in the reward", "k2 as a loss", "k1 as a loss", "k3 as a loss"],
)
def test_the_place_of_the_kl_penalty_decides_the_optimum(reward_kl, loss_kl, expected):
    np.testing.assert_allclose(solve_bandit(reward_kl, loss_kl), expected, atol=2e-5)
