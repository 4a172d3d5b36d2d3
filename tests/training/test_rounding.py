"""Optimizer states in bfloat16: where rounding to the nearest stalls, and stochastic rounding does not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.core.config import parse
from hybrid_jax.training.optimizers import OPTIMIZERS, scale_by_adam
from hybrid_jax.training.rounding import round_stochastically, stored_in


def optimizer_of(name, **settings):
    return parse(OPTIMIZERS[name], settings)


def test_every_number_becomes_one_of_its_neighbours_and_the_mean_is_exact():
    values = np.float32([1.0, 1.003, -1.003, 0.7, 3e-5, -2e-30, 0.0, 255.9])
    many = jnp.asarray(np.repeat(values[:, None], 40_000, axis=1))
    rounded = np.asarray(round_stochastically(many, jnp.uint32(5)), np.float64)
    for value, row in zip(values.astype(np.float64), rounded, strict=True):
        below = np.float64(np.uint32(np.float32(value).view(np.uint32) & 0xFFFF0000).view(np.float32))
        above = np.nextafter(ml_dtypes.bfloat16(below), ml_dtypes.bfloat16(np.copysign(np.inf, value)))
        spacing = abs(np.float64(above) - below)
        assert set(row) <= ({below} if value == below else {below, np.float64(above)})
        np.testing.assert_allclose(row.mean(), value, atol=4 * 0.5 * spacing / 200)  # four standard errors


def test_what_is_not_finite_stays_so():
    all_ones = np.uint32(0x7FFFFFFF).view(np.float32)  # a NaN to which noise must not be added
    rounded = round_stochastically(jnp.float32([np.inf, -np.inf, np.nan, all_ones]), jnp.uint32(1))
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), [np.inf, -np.inf, np.nan, np.nan])


def test_two_updates_two_moments_and_two_elements_share_no_noise():
    transform = stored_in("bfloat16", scale_by_adam(0.5, 0.5, 1e-8))
    gradient = {"a": jnp.full((64, 64), 0.7), "b": jnp.full((64, 64), 0.7)}
    state = transform.init(gradient)
    seen = []
    for _ in range(2):
        _, new = transform.update(gradient, state, gradient)
        seen += [np.asarray(leaf, np.float32) > 0.35 for leaf in jax.tree.leaves(new.state.mu)]
        state = state._replace(count=state.count + 1)  # only the count differs
    for i, first in enumerate(seen):
        assert 0.1 < first.mean() < 0.9
        assert len({row.tobytes() for row in first}) == 64
        for second in seen[:i]:
            agreement = (first == second).mean()
            chance = first.mean() ** 2 + (1 - first.mean()) ** 2
            assert abs(agreement - chance) < 4 * 0.5 / 64  # four standard errors


def second_moments(transform, size, steps, gradient):
    """Mean second moment once ``steps`` equal gradients have followed a moment of 1."""
    params = {"w": jnp.zeros(size)}
    state = transform.init(params)
    nu = jax.tree.map(jnp.ones_like, state.state.nu if hasattr(state, "state") else state.nu)
    state = (
        state._replace(state=state.state._replace(nu=nu)) if hasattr(state, "state") else state._replace(nu=nu)
    )
    gradients = {"w": jnp.full(size, gradient)}

    def step(state, _):
        return transform.update(gradients, state, params)[1], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[0])(state)
    inner = state.state if hasattr(state, "state") else state
    return float(jnp.mean(inner.nu["w"].astype(jnp.float32)))


def test_a_second_moment_rounded_to_the_nearest_stalls_and_ours_does_not():
    beta2, steps, square = 0.999, 3000, 0.25
    exact = square + (1 - square) * beta2**steps  # 0.2873
    nearest = np.ones((), ml_dtypes.bfloat16)
    for _ in range(steps):
        nearest = ml_dtypes.bfloat16(beta2 * np.float32(nearest) + (1 - beta2) * square)
    assert float(nearest) == 1.0  # for ever
    ours = second_moments(stored_in("bfloat16", scale_by_adam(0.9, beta2, 1e-8)), 4096, steps, square**0.5)
    assert ours == pytest.approx(exact, rel=0.01)


def test_the_noise_does_not_depend_on_the_devices():
    transform = stored_in("bfloat16", scale_by_adam(0.9, 0.999, 1e-8))
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(0, 1, (16, 24)), jnp.float32)}
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    split = jax.device_put(gradient, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    one, many = (jax.jit(transform.update)(g, transform.init(g), g)[1] for g in (gradient, split))
    assert not many.state.mu["w"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, one, many)


@pytest.mark.parametrize(("name", "moments"), [("adam", 2), ("adamw", 2), ("lion", 1), ("sgd", 1), ("muon", 1)])
def test_moments_take_half_the_memory(name, moments):
    params = {"kernel": jnp.zeros((32, 64))}
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        state = optimizer_of(name, state_dtype=dtype, **momentum).transform().init(params)
        sizes[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == {"float32": moments * 4 * 32 * 64, "bfloat16": moments * 2 * 32 * 64}


def test_in_float32_nothing_is_added():
    transform = scale_by_adam(0.9, 0.999, 1e-8)
    assert stored_in("float32", transform) is transform


RATES = {"adam": 0.1, "lion": 0.03, "sgd": 0.2, "muon": 0.1}


@pytest.mark.parametrize("name", list(RATES))
def test_an_optimizer_with_rounded_moments_finds_the_minimum_of_a_quadratic(name):
    random = np.random.default_rng(0)
    target = {"kernel": jnp.asarray(random.normal(0, 1, (8, 6)), jnp.float32), "bias": jnp.ones(3)}
    extra = {"sgd": {"momentum": 0.5}, "muon": {"weight_decay": 0.0}}.get(name, {})
    optimizer = optimizer_of(name, learning_rate=RATES[name], state_dtype="bfloat16", **extra)
    transform = optimizer.transform()

    def step(carry, index):
        params, state = carry
        updates, state = transform.update(jax.tree.map(jnp.subtract, params, target), state, params)
        rate = optimizer.rate(index, 400)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), None

    start = jax.tree.map(lambda x: x + 1.0, target)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(400)))((start, transform.init(start)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=6e-3), params, target)


def test_adam_with_rounded_moments_follows_adam():
    """The mean over many parameters with the same noisy gradient: per element the noise is that of 8 bits."""
    random = np.random.default_rng(1)
    gradients = jnp.asarray(random.normal(0.2, 1.0, (200, 1)), jnp.float32) * jnp.ones((1, 2048))
    moved = {}
    for dtype in ("float32", "bfloat16"):
        transform = optimizer_of("adam", state_dtype=dtype).transform()
        params = jnp.zeros(2048)

        def step(carry, gradient, transform=transform):
            params, state = carry
            updates, state = transform.update(gradient, state, params)
            return (params - 0.01 * updates, state), None

        run = jax.jit(lambda c, step=step: jax.lax.scan(step, c, gradients)[0][0])
        moved[dtype] = np.asarray(run((params, transform.init(params))))
    assert abs(moved["float32"][0]) > 0.1
    np.testing.assert_allclose(moved["bfloat16"].mean(), moved["float32"][0], rtol=2e-3)
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=0.05)
