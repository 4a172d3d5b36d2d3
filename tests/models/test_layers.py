"""The hand-written CPU gradients equal the plain path and, where a formula is short, plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models import layers


def _close(fast, plain, tolerance):
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def _random(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _value_and_gradients(function, *arguments):
    """Outputs and the gradient of a fixed random projection, with respect to every argument."""

    @jax.jit
    def run(arguments):
        out, pull_back = jax.vjp(function, *arguments)
        return out, pull_back(jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype))

    return run(arguments)


CASES = {
    "linear": (layers.linear, layers.plain_linear, ((3, 5, 7), (7, 4), (4,))),
    "linear without bias": (layers.linear, layers.plain_linear, ((3, 5, 7), (7, 4))),
    "layer norm": (
        lambda x, s, b: layers.layer_norm(x, s, b, 1e-5),
        lambda x, s, b: layers.plain_normalize(x, s, b, True, 1e-5),
        ((3, 5, 7), (7,), (7,)),
    ),
    "rms norm": (
        lambda x, s: layers.rms_norm(x, s, 1e-6),
        lambda x, s: layers.plain_normalize(x, s, None, False, 1e-6),
        ((3, 5, 7), (7,)),
    ),
    "gelu": (layers.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True), ((3, 5, 7),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_hand_written_values_and_gradients_equal_the_plain_path(name, dtype, tolerance):
    fast, plain, shapes = CASES[name]
    arguments = _random(*shapes, dtype=dtype)  # bfloat16 keeps 8 bits: 4e-2 is ten roundings
    _close(_value_and_gradients(fast, *arguments), _value_and_gradients(plain, *arguments), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_hand_written_gradients_can_be_vmapped_inside_a_scan(name):
    fast, plain, shapes = CASES[name]
    arguments = _random(*((4, *shape) for shape in shapes))

    def train(function):
        gradient = jax.grad(lambda a: jnp.sum(jnp.square(function(*a))))

        def run(a):
            step = lambda a, _: (jax.tree.map(lambda x, g: x - 1e-3 * g, a, gradient(a)), None)  # noqa: E731
            return jax.lax.scan(step, a, length=3)[0]

        return jax.jit(jax.vmap(run))(arguments)

    _close(train(fast), train(plain), 1e-5)


def test_layer_norm_and_rms_norm_equal_their_formula():
    x, scale, bias = (np.asarray(a, np.float64) for a in _random((2, 6), (6,), (6,)))
    centered = x - x.mean(-1, keepdims=True)
    layer = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    f = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    np.testing.assert_allclose(layers.layer_norm(f(x), f(scale), f(bias), 1e-5), layer, atol=2e-6)
    np.testing.assert_allclose(layers.rms_norm(f(x), f(scale), 1e-6), rms, atol=2e-6)


def test_gelu_is_finite_far_out():
    x = jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4])
    y, slope = jax.jit(jax.vmap(jax.value_and_grad(layers.gelu_tanh)))(x)
    np.testing.assert_array_equal(y, [0.0, 0.0, 0.0, 100.0, 1e4])
    np.testing.assert_array_equal(slope, [0.0, 0.0, 0.5, 1.0, 1.0])
