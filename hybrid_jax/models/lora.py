"""Low-rank adapters: a frozen linear map ``W`` learns through two thin ones.

    y = x W + b + s · drop(x) A B            A [I r], B [r O], s = α/r      Hu et al. 2021, section 4.1
                                             rank-stabilised: s = α/√r      Kalajdzievski 2023, eq. 9
    y = g (x W + s · drop(x) A B) + b        DoRA: g = m / ‖W + s A B‖      Liu et al. 2024, eq. 5
                                             a norm for each output, a constant of the gradient (section 4.3)

A is uniform in ±1/√I, B zero and m ‖W‖, so a fresh adapter changes nothing (DoRA's: but for rounding).

The parameters of a model with adapters are ``{**base, "lora": adapter}``; below "lora" lie "a", "b" (and
"magnitude") under the path of the map that they change. Only the adapter trains: `split` and `whole`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Positive, Rate, Width, settings
from hybrid_jax.models.layers import linear

Params = dict[str, Any]
ADAPTER = "lora"  # the key of the adapter, and its Linen collection
ALL_MAPS = r"layer_\d+/(attention/(query|key|value|output)|mlp/(shared/)?(gate|up|down))"


@settings
class Lora:
    """Settings of the adapters.

    Attributes:
        rank: r, columns of A.
        alpha: α, the strength; the scale is α / r.
        targets: a regular expression over the whole paths of linear maps, such as
            ``layer_\\d+/attention/(query|value)``; all of attention and MLPs. Also ``lm_head``, if not tied.
        dropout: rate on what A reads, in supervised training only.
        rank_stabilized: the scale is α / √r.
        dora: direction and magnitude are learnt apart.
        path: a folder of `peft` to start from; it brings all other settings.
    """

    rank: Width = 8
    alpha: Positive = 16.0
    targets: str = ALL_MAPS
    dropout: Rate = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    path: str | None = None

    def __post_init__(self):
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets must be a regular expression ({error}), got {self.targets!r}") from error

    @property
    def scale(self) -> float:
        """The factor on what the adapters add: α / rank, or α / √rank if stabilised."""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)


def scale_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """``s``."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def split(params: Params) -> tuple[Params, Params]:
    """Splits parameters into those that train and those that stay: adapter and base, or all and none."""
    if ADAPTER not in params:
        return params, {}
    return {ADAPTER: params[ADAPTER]}, {name: part for name, part in params.items() if name != ADAPTER}


def whole(base: Params, trained: Params) -> Params:
    """All parameters again, the inverse of `split`; nothing is copied."""
    return {**base, **trained}


def add_adapter(lora: Lora | None, params: Params, key: Array) -> Params:
    """``params`` with a fresh adapter, which changes nothing yet.

    Raises:
        UserError: ``targets`` matches no linear map, or something that is none.
    """
    if lora is None:
        return params
    kernels = {path: params_at(params, path)["kernel"] for path in targeted(lora, params)}
    return {**params, ADAPTER: nested(_fresh(lora, kernels, key))}


@partial(jax.jit, static_argnames="lora")
def _fresh(lora: Lora, kernels: dict[str, Array], key: Array) -> dict[str, Params]:
    adapters = {}
    keys = jax.random.split(key, len(kernels))
    for (path, kernel), own_key in zip(kernels.items(), keys, strict=True):
        inputs, outputs = kernel.shape
        bound = 1.0 / math.sqrt(inputs)
        a = jax.random.uniform(own_key, (inputs, lora.rank), jnp.float32, -bound, bound)
        adapters[path] = {"a": a, "b": jnp.zeros((lora.rank, outputs))}
        if lora.dora:
            adapters[path]["magnitude"] = column_norms(kernel)
    return adapters


def targeted(lora: Lora, params: Params) -> list[str]:
    """The paths of the linear maps that ``targets`` matches."""
    leaves = flatten_dict({name: part for name, part in params.items() if name != ADAPTER}, sep="/")
    modules = dict.fromkeys(path.rpartition("/")[0] for path in leaves)
    maps = [path.removesuffix("/kernel") for path, x in leaves.items() if _is_map(path, x)]
    matched = [module for module in modules if re.fullmatch(lora.targets, module)]
    if wrong := [module for module in matched if module not in maps]:
        raise UserError(f"lora.targets {lora.targets!r} matches {wrong[0]!r}, which is no single linear map")
    if not matched:
        raise UserError(
            f"lora.targets must match linear maps such as {', '.join(maps[:4])}, got {lora.targets!r}"
        )
    return matched


def _is_map(path: str, leaf: Any) -> bool:
    return path.endswith("/kernel") and len(leaf.shape) == 2


def adapted_linear(
    lora: Lora | None,
    adapter: Mapping[str, Any] | None,
    x: Float[Array, "... I"],
    kernel: Float[Array, "I O"],
    bias: Float[Array, "O"] | None = None,
    *,
    dtype: Any,
    out_dtype: Any = None,
    drop: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "... O"]:
    """`layers.linear` in ``dtype`` through the adapter of a map, or without where it has none.

    ``drop`` is what A's input goes through. Sums are in float32.
    """
    if lora is None or adapter is None:
        return linear(x, kernel.astype(dtype), bias, out_dtype)
    a, b = (adapter[name].astype(x.dtype) for name in ("a", "b"))
    learnt = lora.scale * linear(linear(drop(x), a), b, out_dtype=jnp.float32)
    if "magnitude" in adapter:
        y = linear(x, kernel.astype(dtype), out_dtype=jnp.float32) + learnt
        y = y * _gain(lora, adapter, kernel)
        y = y if bias is None else y + bias
    else:
        y = linear(x, kernel.astype(dtype), bias, jnp.float32) + learnt
    return y.astype(out_dtype or x.dtype)


def merge(lora: Lora | None, params: Params) -> Params:
    """Parameters of the base that do what base and adapter do together."""
    if lora is None or ADAPTER not in params:
        return params
    merged = flatten_dict(split(params)[1], sep="/")
    for path, adapter in adapters_of(params).items():
        merged[f"{path}/kernel"] = _merged(lora, adapter, jnp.asarray(merged[f"{path}/kernel"]))
    return unflatten_dict(merged, sep="/")


def adapters_of(params: Params) -> dict[str, Params]:
    """The adapter of each map, by the path of the map."""
    found: dict[str, Params] = {}
    for path, leaf in flatten_dict(params[ADAPTER], sep="/").items():
        module, _, name = path.rpartition("/")
        found.setdefault(module, {})[name] = leaf
    return found


def nested(by_path: dict[str, Any]) -> Params:
    """A tree of what lies under paths like ``layer_0/mlp/up``."""
    return unflatten_dict(by_path, sep="/")


def params_at(params: Params, path: str) -> Params:
    """The part of a nested dict at a path with slashes."""
    for name in path.split("/"):
        params = params[name]
    return params


def column_norms(kernel: Float[Array, "I O"]) -> Float[Array, "O"]:
    """The Euclidean norm of each column, float32 [O]."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0))


@partial(jax.jit, static_argnames="lora")
def _merged(lora: Lora, adapter: Params, kernel: Array) -> Array:
    total = _sum(lora, adapter, kernel)
    total = total * _gain(lora, adapter, kernel) if "magnitude" in adapter else total
    return total.astype(kernel.dtype)


def _sum(lora: Lora, adapter: Mapping[str, Any], kernel: Array) -> Float[Array, "I O"]:
    return kernel.astype(jnp.float32) + lora.scale * jnp.matmul(
        adapter["a"], adapter["b"], precision=lax.Precision.HIGHEST
    )


def _gain(lora: Lora, adapter: Mapping[str, Any], kernel: Array) -> Float[Array, "O"]:
    return adapter["magnitude"] / lax.stop_gradient(column_norms(_sum(lora, adapter, kernel)))
