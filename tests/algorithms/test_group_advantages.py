"""Advantages against the other answers to a prompt: literal numbers and sums over all subsets."""

import math
from itertools import combinations

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.advantages import Returns
from hybrid_jax.algorithms.group_advantages import GroupRelative, LeaveOneOut, PassAtK

EARNED = np.array([1.0, 0.0, 0.0, 0.5])


def advantages(estimator, earned=EARNED, group=None):
    """Of responses of two tokens, where all is earned with the last one; one number a response."""
    earned = jnp.asarray(earned, jnp.float32)
    rewards = jnp.stack([jnp.zeros_like(earned), earned, jnp.full_like(earned, jnp.nan)], axis=1)
    mask = jnp.broadcast_to(jnp.array([True, True, False]), rewards.shape)
    group = jnp.zeros(len(earned), int) if group is None else jnp.asarray(group)
    found, returns = estimator(rewards, None, mask, group)
    assert returns is None
    np.testing.assert_array_equal(found[:, 2], 0.0)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    return np.asarray(found[:, 0])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (LeaveOneOut(), [0.8333333, -0.5, -0.5, 0.1666667]),
        (GroupRelative(), [1.3053097, -0.7831858, -0.7831858, 0.2610619]),
        (GroupRelative("none"), [0.625, -0.375, -0.375, 0.125]),
    ],
)
def test_a_group_has_the_literal_advantages(estimator, expected):
    assert advantages(estimator) == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one():
    random = np.random.default_rng(0)
    earned, group = random.normal(size=12), np.repeat([0, 4, 9], 4)
    centred = advantages(GroupRelative("none"), earned, group)
    assert advantages(LeaveOneOut(), earned, group) == pytest.approx(4 / 3 * centred, abs=1e-6)
    by_rollout = advantages(GroupRelative("rollout"), earned, group)
    assert by_rollout == pytest.approx(centred / (earned.std(ddof=1) + 1e-4), abs=1e-5)


def test_groups_are_known_by_their_number_wherever_their_rows_lie():
    earned, group = np.array([1.0, 7.0, 0.0, 3.0, 0.0, 0.5]), np.array([3, 1, 3, 1, 3, 3])
    for estimator in (LeaveOneOut(), GroupRelative(), PassAtK(2)):
        found = advantages(estimator, earned, group)
        assert found[group == 3] == pytest.approx(advantages(estimator, EARNED), abs=1e-6)
        assert found[group == 1] == pytest.approx(advantages(estimator, [7.0, 3.0]), abs=1e-6)


def test_answers_that_earn_the_same_have_no_advantage():
    for estimator in (LeaveOneOut(), GroupRelative(), PassAtK(3)):
        np.testing.assert_allclose(advantages(estimator, [0.7] * 4), 0.0, atol=1e-6)
    # The mean of such numbers is off by a rounding, which a deviation of nearly 0 made an advantage of 0.37.
    for earned in ([87.3] * 8, [1000.1] * 8, [87.3] * 3):
        np.testing.assert_array_equal(advantages(GroupRelative(), earned), 0.0)


def test_a_response_that_is_left_out_changes_no_deviation_of_a_rollout():
    earned, there = jnp.array([10.0, 11.0, 12.0, 9.0]), jnp.array([True, True, False, False])
    group = jnp.array([0, 0, 1, 1])
    found, _ = GroupRelative("rollout")(earned[:, None], None, there[:, None], group)
    np.testing.assert_allclose(found[:, 0], [-0.7070, 0.7070, 0.0, 0.0], atol=1e-4)


def test_the_best_of_many_of_many_is_finite_and_a_group_that_is_too_small_has_no_advantage():
    earned = np.arange(200.0) / 200  # the chance that the best of 100 is the i-th, of C(200, 100) sets
    found = advantages(PassAtK(100), earned)
    assert np.isfinite(found).all()
    assert found[-1] == pytest.approx(199 / 200 - _best_of(earned, 100), abs=1e-5)
    np.testing.assert_array_equal(advantages(PassAtK(3), [1.0, 0.5]), 0.0)
    assert PassAtK(4).min_group == 5  # of four answers, all are in the only set of four


def _best_of(earned, k):
    sets = [math.comb(i, k - 1) for i in range(len(earned))]
    return sum(count / math.comb(len(earned), k) * value for count, value in zip(sets, earned, strict=True))


@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("earned", [[1, 0, 0, 1, 0, 0, 0, 0, 1, 0], [0.3, -1.2, 2.0, 0.3, 0.1, 1.1, -0.4]])
def test_pass_at_k_is_the_best_of_all_subsets_with_an_answer_less_that_of_all_subsets(k, earned):
    sets = list(combinations(range(len(earned)), k))
    mean = np.mean([max(earned[i] for i in chosen) for chosen in sets])
    expected = [
        np.mean([max(earned[i] for i in chosen) for chosen in sets if b in chosen]) - mean
        for b in range(len(earned))
    ]
    assert advantages(PassAtK(k), np.array(earned, float)) == pytest.approx(expected, abs=1e-5)
    if k == 4 and len(earned) == 10:
        assert mean == pytest.approx(5 / 6)


def test_returns_are_what_is_received_from_a_token_on():
    rewards = jnp.array([[1.0, jnp.nan, 2.0, 3.0], [4.0, 1.0, jnp.nan, jnp.nan]])
    mask = jnp.array([[True, False, True, True], [True, True, False, False]])
    found, _ = Returns(discount=0.5)(rewards, None, mask, jnp.arange(2))
    np.testing.assert_allclose(found, [[2.75, 0.0, 3.5, 3.0], [4.5, 1.0, 0.0, 0.0]])
    found, _ = Returns(discount=0.5, baseline="rollout")(rewards, None, mask, jnp.arange(2))
    mean = (2.75 + 3.5 + 3.0 + 4.5 + 1.0) / 5
    expected = np.where(mask, np.array([[2.75, 0, 3.5, 3], [4.5, 1, 0, 0]]) - mean, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "estimator",
    [LeaveOneOut(), *(GroupRelative(scale) for scale in ("group", "rollout", "none")), PassAtK(2), PassAtK(1)],
    ids=["rloo", "grpo", "rollout", "dr_grpo", "pass_2", "pass_1"],
)
def test_an_answer_that_is_left_out_is_no_member_of_its_group(estimator):
    rewards = jnp.array([51.0, 50.0, 0.0, 50.0, 50.0, 53.0, 0.0, 49.0, 50.0, 0.0, 52.0, 47.0])[:, None]
    group = jnp.arange(12) // 4
    here = np.array([True, True, False, True, True, True, False, True, True, False, True, True])
    found, _ = estimator(rewards, None, jnp.asarray(here)[:, None], group)
    alone, _ = estimator(rewards[here], None, jnp.ones((9, 1), bool), group[here])
    np.testing.assert_allclose(found[here], alone, rtol=1e-5, atol=1e-5)
    assert not np.asarray(found[~here]).any()
