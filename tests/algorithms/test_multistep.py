"""n-step returns and V-trace: published vectors, plain loops over the valid tokens, ratios of 1."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.advantages import gae
from hybrid_jax.algorithms.multistep import n_step, vtrace


def random_batch(seed, rows=4, length=9):
    """Arrays and a mask with holes; one row is full, one has a single token, one has none."""
    random = np.random.default_rng(seed)
    mask = random.random((rows, length)) < 0.6
    mask[0], mask[1], mask[2] = True, np.arange(length) == 4, False
    return random.normal(0, 1, (3, rows, length)), mask


def before(values):
    """The values before each token out of those after each, as rlax has them; the first is nobody's."""
    return jnp.array([0.0, *values[:-1]])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [2.0, 0.9, 4.0, -2.5, 3.4]),  # r + discount · v
        (3, [2.8, -3.15, 0.7, 1.7, 3.4]),
        (5, [1.315, 0.63, 0.7, 1.7, 3.4]),
        (7, [1.315, 0.63, 0.7, 1.7, 3.4]),
    ],
)
def test_n_step_returns_are_the_vectors_of_rlax(steps, expected):
    """There a value follows the last token; here it is 0, so discount · value is part of the last reward."""
    rewards, values = [1.0, 0.0, -1.0, 0.0, 1.0], [3.0, 1.0, 5.0, -5.0, 3.0]
    discounts = jnp.array([0.5, 0.9, 1.0, 0.5, 0.8])
    rewards[-1] += 0.8 * values[-1]
    old = before(values)
    advantages, returns = n_step(
        jnp.array(rewards), old, jnp.ones(5, bool), steps=steps, discount=discounts[:5]
    )
    if steps == 1:
        expected = [1 + 0.5 * 3, 0 + 0.9 * 1, -1 + 1.0 * 5, 0.5 * -5, 1 + 0.8 * 3]
    np.testing.assert_allclose(returns, expected, atol=1e-6)
    np.testing.assert_allclose(advantages, np.array(expected) - old, atol=1e-6)


def n_step_loop(rewards, values, mask, steps, discount):
    returns = np.zeros_like(rewards)
    for b in range(len(rewards)):
        valid = np.flatnonzero(mask[b])
        for i, t in enumerate(valid):
            window = valid[i : i + steps]
            returns[b, t] = sum(discount**k * rewards[b, u] for k, u in enumerate(window))
            if i + steps < len(valid):
                returns[b, t] += discount**steps * values[b, valid[i + steps]]
    return np.where(mask, returns - values, 0.0), returns


@pytest.mark.parametrize(("steps", "discount"), [(1, 0.9), (2, 1.0), (3, 0.7), (100, 0.97)])
def test_n_step_equals_its_definition_on_masks_with_holes(steps, discount):
    (rewards, values, _), mask = random_batch(1)
    expected = n_step_loop(rewards, values, mask, steps, discount)
    rewards[~mask] = values[~mask] = np.nan  # masked garbage changes nothing
    got = n_step(jnp.array(rewards), jnp.array(values), jnp.array(mask), steps=steps, discount=discount)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-6)


def test_n_step_of_one_and_of_all_tokens_is_gae_with_trace_0_and_1():
    (rewards, values, _), mask = random_batch(2)
    arrays = jnp.array(rewards), jnp.array(values), jnp.array(mask)
    for steps, trace in ((1, 0.0), (9, 1.0)):
        got, expected = n_step(*arrays, steps=steps, discount=0.9), gae(*arrays, discount=0.9, trace=trace)
        np.testing.assert_allclose(got[0], expected[0], atol=2e-6)
        np.testing.assert_allclose(got[1], expected[1], atol=2e-6)


# google-deepmind/rlax, vtrace_test.py; a value after the last token is part of the last reward here.
BEHAVIOUR = [
    [[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]],
    [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]],
]
TARGET = [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
ACTIONS = [[0, 1, 0, 0], [1, 0, 0, 1]]
REWARDS = np.array([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]])
DISCOUNTS = np.array([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]])
VALUES = np.array([[2.1, 1.1, -3.1, 0.0], [3.1, 0.1, -1.1, 7.4]])
AFTER = np.array([8.4, -1.2])
EXPECTED = np.array(
    [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]]
)


def published_log_ratios():
    def log_probs(logits):
        logits = np.array(logits)
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logits, np.array(ACTIONS)[..., None], -1)[..., 0]

    return log_probs(TARGET) - log_probs(BEHAVIOUR)


def published(**settings):
    rewards = REWARDS.copy()
    rewards[:, -1] += DISCOUNTS[:, -1] * AFTER
    arrays = [jnp.array(x, jnp.float32) for x in (rewards, VALUES, published_log_ratios())]
    return vtrace(*arrays, jnp.ones((2, 4), bool), discount=jnp.array(DISCOUNTS, jnp.float32), **settings)


def test_vtrace_reproduces_the_vectors_of_rlax():
    advantages, targets = published()
    np.testing.assert_allclose(targets - VALUES, EXPECTED, rtol=1e-3, atol=1e-6)  # as exact as there
    np.testing.assert_allclose(advantages, EXPECTED, rtol=1e-3, atol=1e-6)


def test_targets_of_vtrace_lie_where_the_advantages_say_for_any_trace():
    """rlax: V + min(1, ρ) (q − V) is the target, for λ below 1 too."""
    advantages, targets = published(trace=0.8)
    np.testing.assert_allclose(targets, VALUES + np.array(advantages), rtol=1e-3)


def vtrace_loop(rewards, values, log_ratios, mask, discount, trace, rho_cap, trace_cap):
    """The sum of the definition, no recursion."""
    targets, advantages = np.zeros_like(rewards), np.zeros_like(rewards)
    for b in range(len(rewards)):
        valid = np.flatnonzero(mask[b])
        r, v, ratio = rewards[b, valid], np.append(values[b, valid], 0.0), np.exp(log_ratios[b, valid])
        goals = np.zeros(len(valid) + 1)
        for t in range(len(valid)):
            goals[t] = v[t] + sum(
                discount ** (i - t)
                * np.prod([trace * min(trace_cap, ratio[j]) for j in range(t, i)])
                * min(rho_cap, ratio[i])
                * (r[i] + discount * v[i + 1] - v[i])
                for i in range(t, len(valid))
            )
        for t, place in enumerate(valid):
            after = trace * goals[t + 1] + (1 - trace) * v[t + 1]
            targets[b, place] = goals[t]
            advantages[b, place] = min(rho_cap, ratio[t]) * (r[t] + discount * after - v[t])
    return advantages, targets


@pytest.mark.parametrize(
    ("discount", "trace", "rho_cap", "trace_cap"), [(1.0, 1.0, 1.0, 1.0), (0.9, 0.8, 2.0, 0.5)]
)
def test_vtrace_equals_its_definition_on_masks_with_holes(discount, trace, rho_cap, trace_cap):
    (rewards, values, ratios), mask = random_batch(3)
    expected = vtrace_loop(rewards, values, ratios, mask, discount, trace, rho_cap, trace_cap)
    for array in (rewards, values, ratios):
        array[~mask] = np.nan
    arrays = [jnp.array(x) for x in (rewards, values, ratios, mask)]
    got = vtrace(*arrays, discount=discount, trace=trace, rho_cap=rho_cap, trace_cap=trace_cap)
    np.testing.assert_allclose(got[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=5e-6)


@pytest.mark.parametrize("trace", [1.0, 0.6])
def test_vtrace_of_the_policy_that_sampled_has_the_returns_of_gae(trace):
    (rewards, values, _), mask = random_batch(4)
    rewards, values, mask = jnp.array(rewards), jnp.array(values), jnp.array(mask)
    advantages, targets = vtrace(rewards, values, 0 * rewards, mask, discount=0.9, trace=trace)
    expected, returns = gae(rewards, values, mask, discount=0.9, trace=trace)
    np.testing.assert_allclose(targets, returns, atol=2e-6)
    np.testing.assert_allclose(advantages, expected, atol=2e-6)
    if trace == 1:
        np.testing.assert_allclose(targets, n_step(rewards, values, mask, steps=9, discount=0.9)[1], atol=2e-6)
