"""The KL: its estimators, the penalty in the rewards, and golden numbers of the adaptive controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl import KL_CONTROLS, AdaptiveKL, FixedKL, k1, k2, k3, token_rewards
from hybrid_jax.core.config import parse


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (12.0, 0.201024),  # error clipped to 0.2:  0.2 (1 + 0.2 · 0.0256)
        (5.7, 0.199744),  # error −0.05:            0.2 (1 − 0.05 · 0.0256)
        (6.0, 0.2),
        (0.0, 0.198976),  # error clipped to −0.2
    ],
)
def test_the_adaptive_coefficient_follows_the_golden_numbers(kl, expected):
    control = AdaptiveKL(initial=0.2, target=6.0, horizon=10_000)
    state = jax.jit(control.update)(control.init(), jnp.array(kl), 256)
    assert float(control.coefficient(state)) == pytest.approx(expected, abs=1e-7)


def test_the_adaptive_coefficient_stays_positive_for_a_batch_beyond_the_horizon():
    control = AdaptiveKL(initial=0.2, target=6.0, horizon=100)
    assert float(control.update(control.init(), jnp.array(0.0), 100_000)) == pytest.approx(0.16, abs=1e-7)


def test_the_fixed_coefficient_never_moves():
    control = FixedKL(coef=0.05)
    state = control.update(control.init(), jnp.array(100.0), 256)
    assert float(control.coefficient(state)) == pytest.approx(0.05)


@pytest.mark.parametrize("name", list(KL_CONTROLS))
def test_every_control_can_be_scanned_and_mapped(name):
    control = KL_CONTROLS[name]()
    kls = jnp.linspace(0.0, 20.0, 12).reshape(3, 4)

    def run(kls):
        return jax.lax.scan(
            lambda s, kl: (control.update(s, kl, 64), control.coefficient(s)), control.init(), kls
        )

    final, used = jax.jit(jax.vmap(run))(kls)
    state = control.init()
    for i, kl in enumerate(kls[2]):
        np.testing.assert_allclose(used[2, i], control.coefficient(state), rtol=1e-6)
        state = control.update(state, kl, 64)
    np.testing.assert_allclose(final[2], state, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fixed", "coef": -1.0}, "coef must be at least 0, got -1.0"),
        ({"name": "adaptive", "target": 0.0}, "target must be above 0, got 0.0"),
        ({"name": "adaptive", "horizon": float("nan")}, "horizon must be above 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    name = settings.pop("name")
    with pytest.raises(Exception, match=message):
        parse(KL_CONTROLS[name], settings)


def test_the_score_lands_on_the_last_response_token_and_keeps_its_fraction():
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    zeros = jnp.zeros((4, 4))
    got = token_rewards(jnp.array([0.7, -0.3, 0.1, 9.0]), zeros, {"sft": zeros}, {"sft": 1.0}, 0.1, mask)
    expected = [[0, 0, 0, 0.7], [0, -0.3, 0, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def test_token_rewards_equal_a_loop_over_several_references():
    random = np.random.default_rng(6)
    mask = random.random((4, 9)) < 0.6
    mask[0], mask[1], mask[2] = (
        True,
        np.arange(9) == 4,
        False,
    )  # one full row, one of a single token, one of none
    log_probs, first, second = random.normal(0, 1, (3, 4, 9))
    scores = np.array([0.5, -1.25, 2.0, 0.7])
    expected = np.zeros_like(log_probs)
    for b in range(4):
        for t in np.flatnonzero(mask[b]):
            penalty = 0.75 * (log_probs[b, t] - first[b, t]) + 0.5 * (log_probs[b, t] - second[b, t])
            expected[b, t] = -0.2 * penalty + (scores[b] if t == np.flatnonzero(mask[b])[-1] else 0.0)
    for array in (log_probs, first, second):
        array[~mask] = np.nan
    references = {"a": jnp.array(first), "b": jnp.array(second)}
    got = token_rewards(
        jnp.array(scores), jnp.array(log_probs), references, {"b": 0.5, "a": 0.75}, 0.2, jnp.array(mask)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_weight_without_its_reference_is_refused():
    zeros = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"weights must name the references \['a'\], got \['b'\]"):
        token_rewards(jnp.zeros(1), zeros, {"a": zeros}, {"b": 1.0}, 0.1, jnp.ones((1, 1), bool))


def test_kl_estimators_follow_the_golden_numbers():
    log_ratio = jnp.array([0.1, -0.3, 0.5])  # log π_ref/π
    got = [float(jnp.mean(k(-log_ratio, jnp.zeros(3)))) for k in (k1, k2, k3)]
    np.testing.assert_allclose(got, [-0.1, 0.0583333, 0.0649035], atol=1e-6)


def test_k3_of_nearly_equal_policies_is_not_lost_in_rounding():
    assert float(k3(jnp.array(0.0), jnp.array(1e-4))) == pytest.approx(
        5.0e-9, rel=0.02
    )  # x²/2; exp(x)-1-x is 0 in float32


@pytest.mark.parametrize(
    ("shift", "kl", "k1_noise", "k2_bias"), [(0.1, 0.005, 20.0, 0.0025), (1.0, 0.5, 2.0, 0.25)]
)
def test_kl_estimators_have_the_bias_and_noise_of_two_normal_distributions(shift, kl, k1_noise, k2_bias):
    """Samples of q = N(0, 1) against p = N(μ, 1): KL(q ‖ p) = μ²/2. By Gauss-Hermite quadrature."""
    x, weight = np.polynomial.hermite_e.hermegauss(40)
    weight = weight / weight.sum()
    log_q, log_p = jnp.array(-(x**2) / 2), jnp.array(-((x - shift) ** 2) / 2)

    def expect(values):
        return float(weight @ np.asarray(values, np.float64))

    one, two, three = (k(log_q, log_p) for k in (k1, k2, k3))
    assert expect(one) == pytest.approx(kl, rel=1e-3)
    assert math.sqrt(expect((one - kl) ** 2)) / kl == pytest.approx(k1_noise, rel=1e-3)
    assert expect(two) / kl - 1 == pytest.approx(k2_bias, rel=2e-2)
    assert expect(three) == pytest.approx(kl, rel=1e-3)
    assert float(jnp.min(three)) >= 0.0
