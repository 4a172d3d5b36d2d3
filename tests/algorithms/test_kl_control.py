"""The KL coefficient: golden numbers of the adaptive controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl_control import KL_CONTROLS, AdaptiveKL, FixedKL
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
