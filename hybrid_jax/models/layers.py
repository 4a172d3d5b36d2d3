"""Linear maps, norms and activations as pure functions.

On a CPU, linear maps, norms and `gelu_tanh` carry hand-written gradients over 2-D arrays [rows, width]:
XLA's CPU compiler otherwise recomputes elementwise gradients into strided copies around every weight
gradient. Elsewhere, and as the oracle of the tests, the ``plain_*`` functions leave all but the type of a
gradient's products (`product`) to autodiff and the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hybrid_jax.parallel.rules import shard, target_platform


def on_cpu() -> bool:
    """Tells whether the hand-written CPU formulations are used; decided while tracing."""
    return target_platform() == "cpu"


# ------------------------------------------------------------------------------------------------ products

_LETTERS = "abcdefgh"  # of the axes that a linear map leaves alone


def product(spec: str, a: Array, b: Array) -> Array:
    """``einsum(spec, a, b)``, accumulated and returned in float32.

    Of 16-bit operands the gradient's products have 16-bit operands, too: autodiff would multiply the float32
    cotangent, which accelerators do at a fraction of the speed. Every letter of an operand must be in the other
    one or in the result.
    """
    if a.dtype == b.dtype and a.dtype.itemsize == 2:
        return _narrow_product(spec, a, b)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _narrow_product_forward(spec, a, b):
    # Not `_narrow_product`, which would hide the product from the policies of rematerialisation.
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32), (a, b)


def _narrow_product_backward(spec, saved, dy):
    a, b = saved
    of_a, of_b, out = spec.replace("->", ",").split(",")
    dy = dy.astype(a.dtype)
    da = jnp.einsum(f"{out},{of_b}->{of_a}", dy, b, preferred_element_type=jnp.float32)
    db = jnp.einsum(f"{out},{of_a}->{of_b}", dy, a, preferred_element_type=jnp.float32)
    return da.astype(a.dtype), db.astype(b.dtype)


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


# ------------------------------------------------------------------------------------------------ linear


def linear(
    x: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    bias: Float[Array, "O"] | None = None,
    out_dtype=None,
) -> Float[Array, "... O"]:
    """``y = x W + b``, accumulated in float32, returned as ``out_dtype`` (default: that of ``x``)."""
    dtype = jnp.dtype(out_dtype or x.dtype)
    if not on_cpu():
        return plain_linear(x, kernel, bias, dtype)
    y: Array = _linear(x.reshape(-1, x.shape[-1]), kernel, bias, dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def placed_logits(logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
    """Constrains how next-token scores are split, of whole rows [B T V] or of one token a row [B V]."""
    if logits.ndim == 3:
        return shard(logits, "batch", "length", "vocab")
    if logits.ndim == 2:  # to be sampled where the row is; else the head would travel
        return shard(shard(logits, "batch", "vocab"), "attention_batch", None)
    return logits


def plain_linear(x, kernel, bias=None, out_dtype=None):
    """`linear` without a hand-written gradient."""
    rows = _LETTERS[: x.ndim - 1]
    y = product(f"{rows}i,io->{rows}o", x, kernel)
    y = y if bias is None else y + bias
    return y.astype(out_dtype or x.dtype)


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, kernel, bias, dtype):
    y = _dot(x, kernel, 1, 0)
    return (y if bias is None else y + bias).astype(dtype)


def _linear_forward(x, kernel, bias, dtype):
    return _linear(x, kernel, bias, dtype), (x, kernel, bias)


def _linear_backward(dtype, saved, dy):
    x, kernel, bias = saved
    # The barrier makes XLA compute dy once instead of fusing its producer into each of the three uses.
    dy = lax.optimization_barrier(dy)
    dbias = None if bias is None else jnp.sum(dy, axis=0, dtype=jnp.float32).astype(bias.dtype)
    dy = dy.astype(x.dtype)
    dx, dkernel = _dot(dy, kernel, 1, 1), _dot(x, dy, 0, 0)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), dbias


_linear.defvjp(_linear_forward, _linear_backward)


# ------------------------------------------------------------------------------------------------ norms


def layer_norm(x: Float[Array, "... D"], scale, bias, epsilon: float) -> Float[Array, "... D"]:
    """``(x - mean) / √(variance + ε) · scale + bias``, statistics in float32 (Ba et al. 2016)."""
    return _normalize_any(x, scale, bias, True, epsilon)


def rms_norm(x: Float[Array, "... D"], scale, epsilon: float) -> Float[Array, "... D"]:
    """``x / √(mean(x²) + ε) · scale``, statistics in float32 (Zhang & Sennrich 2019)."""
    return _normalize_any(x, scale, None, False, epsilon)


def _normalize_any(x, scale, bias, centered, epsilon):
    if not on_cpu():
        return plain_normalize(x, scale, bias, centered, epsilon)
    y: Array = _normalize(x.reshape(-1, x.shape[-1]), scale, bias, centered, epsilon)
    return y.reshape(x.shape)


def plain_normalize(x, scale, bias, centered: bool, epsilon: float):
    """Layer norm (``centered``) or RMS norm without a hand-written gradient."""
    wide = x.astype(jnp.float32)
    if centered:
        wide = wide - jnp.mean(wide, -1, keepdims=True)
    y = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalize(x, scale, bias, centered, epsilon):
    return _normalize_forward(x, scale, bias, centered, epsilon)[0]


def _normalize_forward(x, scale, bias, centered, epsilon):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True) if centered else jnp.zeros((x.shape[0], 1), jnp.float32)
    inverse = lax.rsqrt(jnp.mean(jnp.square(wide - mean), -1, keepdims=True) + epsilon)
    y = (wide - mean) * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, mean, inverse, scale, bias)


def _normalize_backward(centered, epsilon, saved, dy):
    x, mean, inverse, scale, bias = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    dy = dy.astype(jnp.float32)
    dnormal = dy * scale
    dx = dnormal - normal * jnp.mean(dnormal * normal, -1, keepdims=True)
    if centered:
        dx = dx - jnp.mean(dnormal, -1, keepdims=True)
    dscale = jnp.sum(dy * normal, axis=0).astype(scale.dtype)
    dbias = None if bias is None else jnp.sum(dy, axis=0).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), dscale, dbias


_normalize.defvjp(_normalize_forward, _normalize_backward)


# ------------------------------------------------------------------------------------------------ activations

_GELU_SLOPE, _GELU_CUBIC = 2.0 * math.sqrt(2.0 / math.pi), 0.044715


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x/2 (1 + tanh z)``, ``z = √(2/π) (x + 0.044715 x³)``, written ``x σ(2z)`` (Hendrycks 2016)."""
    return _gelu_tanh(x) if on_cpu() else jax.nn.gelu(x, approximate=True)


def _gelu_gate(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-_GELU_SLOPE * (x + _GELU_CUBIC * x * x * x)))


@jax.custom_vjp
def _gelu_tanh(x):
    return (x * _gelu_gate(x)).astype(x.dtype)


def _gelu_backward(x, dy):
    gate = _gelu_gate(x)
    slope = _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * x * x)
    return ((dy * gate * (1.0 + x * (1.0 - gate) * slope)).astype(x.dtype),)


_gelu_tanh.defvjp(lambda x: (_gelu_tanh(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}
