"""Low-rank adapters: a frozen linear map ``W`` learns through two thin ones.

    y = x W + b + s · drop(x) A B            A [I r], B [r O], s = α/r      Hu et al. 2021, section 4.1
                                             rank-stabilised: s = α/√r      Kalajdzievski 2023, eq. 9
    y = g (x W + s · drop(x) A B) + b        DoRA: g = m / ‖W + s A B‖      Liu et al. 2024, eq. 5
                                             a norm for each output, a constant of the gradient (section 4.3)

A is uniform in ±1/√I, B zero and m ‖W‖, so a fresh adapter changes nothing (DoRA's: but for rounding).

The parameters of a model with adapters are ``{**base, "lora": adapter}``; below "lora" lie "a", "b" (and
"magnitude") under the path of the map that they change. Only the adapter trains: `split` and `whole`.

Parts of the base may train in full beside them. Below "lora" lies then, at the path of the base's own leaf, the
leaf that is read in its place; or under "rows" [n D] those rows of an embedding, or outputs of a head, that
belong to ``Lora.tokens`` (`overlaid`). A folder of `peft` may also bring "a" [V r] and "b" [r D] of an
embedding, and under "shift" [O] what B adds as a bias.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Natural, Positive, Rate, Width, settings
from hybrid_jax.models.layers import linear

Params = dict[str, Any]
ADAPTER = "lora"  # the key of the adapter, and its Linen collection
DATASTORE = "datastore"  # the key of what is looked up and never trains
ROWS = "rows"  # the leaf with the rows of single tokens
_LOW_RANK = ("a", "b", "magnitude", "shift")
_TABLES = {"token_embedding/embedding": 0, "lm_head/kernel": 1}  # the axis of the tokens
BIAS = r"(.*/)?bias"  # the paths of all biases
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
        train_fully: a regular expression over the whole paths of modules that train in full beside the
            adapters, such as ``token_embedding|lm_head`` where the model shall learn new tokens.
        bias: the biases of the base that train: none, all, or those of the maps with adapters.
        tokens: ids whose own rows of the embedding, and of a head that is not tied, train; a smaller way than
            ``train_fully`` to learn new tokens.
        path: a folder of `peft` to start from; it brings all other settings.
    """

    rank: Width = 8
    alpha: Positive = 16.0
    targets: str = ALL_MAPS
    dropout: Rate = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    train_fully: str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    tokens: tuple[Natural, ...] = ()
    path: str | None = None

    def __post_init__(self):
        for name in ("targets", "train_fully"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{name} must be a regular expression ({error}), got {pattern!r}") from error

    @property
    def scale(self) -> float:
        """The factor on what the adapters add: α / rank, or α / √rank if stabilised."""
        return scale_of(self.rank, self.alpha, self.rank_stabilized)


def scale_of(rank: int, alpha: float, rank_stabilized: bool) -> float:
    """``s``."""
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def split(params: Params) -> tuple[Params, Params]:
    """Splits parameters into those that train and those that stay: the adapter, or all but a datastore."""
    trains = {ADAPTER} if ADAPTER in params else params.keys() - {DATASTORE}
    return (
        {name: part for name, part in params.items() if name in trains},
        {name: part for name, part in params.items() if name not in trains},
    )


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
    beside = jax.jit(partial(_beside, lora))(params)
    leaves = _flat(nested(_fresh(lora, kernels, key)))
    return {**params, ADAPTER: unflatten_dict({**leaves, **beside}, sep="/")}


def _beside(lora: Lora, params: Params) -> dict[str, Array]:
    """The parts of the base that train, by path: copies of leaves, and rows."""
    leaves, maps = _flat(params), targeted(lora, params)
    found = {p: jnp.copy(x.astype(jnp.float32)) for p, x in leaves.items() if _trains(lora, p, maps)}
    if lora.train_fully is not None:
        if twice := [path for path in maps if re.fullmatch(lora.train_fully, path)]:
            raise UserError(
                f"lora.targets and lora.train_fully both match {twice[0]!r}; leave it to one of them"
            )
        modules = {path.rpartition("/")[0] for path in leaves}
        if not any(re.fullmatch(lora.train_fully, module) for module in modules):
            known = ", ".join(sorted(name for name in modules if "/" not in name))
            raise UserError(f"lora.train_fully must match modules such as {known}, got {lora.train_fully!r}")
    if not lora.tokens:
        return found
    for path in (path for path in _TABLES if path in leaves):
        if path in found:
            raise UserError(f"lora.tokens train rows of {path!r}, all of which lora.train_fully trains")
        table, axis = leaves[path], _TABLES[path]
        if (largest := max(lora.tokens)) >= table.shape[axis]:
            raise UserError(f"lora.tokens must be below the model's {table.shape[axis]} rows, got {largest}")
        rows = jnp.take(table.astype(jnp.float32), jnp.asarray(lora.tokens), axis)
        found[f"{path.rpartition('/')[0]}/{ROWS}"] = rows.T if axis else rows
    return found


def _trains(lora: Lora, path: str, maps: list[str]) -> bool:
    module = path.rpartition("/")[0]
    if lora.train_fully is not None and re.fullmatch(lora.train_fully, module):
        return True
    return re.fullmatch(BIAS, path) is not None and (
        lora.bias == "all" or (lora.bias == "lora_only" and module in maps)
    )


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
    learnt = linear(linear(drop(x), a), b, out_dtype=jnp.float32)
    learnt = lora.scale * (learnt + adapter["shift"] if "shift" in adapter else learnt)
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
    merged = _flat(overlaid(lora, params)[1])
    for path, adapter in adapters_of(params).items():
        leaf = f"{path}/kernel" if f"{path}/kernel" in merged else f"{path}/embedding"
        merged[leaf] = _merged(lora, adapter, jnp.asarray(merged[leaf]))
        if "shift" in adapter:
            if f"{path}/bias" not in merged:
                raise UserError(
                    f"the adapter gives {path!r} a bias, which the model has no place for: export the adapter"
                )
            merged[f"{path}/bias"] = merged[f"{path}/bias"] + lora.scale * adapter["shift"]
    return unflatten_dict(merged, sep="/")


def overlaid(lora: Lora | None, params: Params) -> tuple[Params, Params]:
    """The low-rank adapters, and the base in which everything else that trains is in its place."""
    if lora is None or ADAPTER not in params:
        return {}, params
    base = _flat(split(params)[1])
    low_rank = {}
    for path, leaf in _flat(params[ADAPTER]).items():
        module, _, name = path.rpartition("/")
        if path in base:
            base[path] = leaf
        elif name == ROWS:
            table = next(table for table in _TABLES if table.startswith(f"{module}/"))
            base[table] = _with_rows(jnp.asarray(base[table]), lora.tokens, leaf, _TABLES[table])
        else:
            low_rank[path] = leaf
    return unflatten_dict(low_rank, sep="/"), unflatten_dict(base, sep="/")


def _with_rows(table: Array, tokens: tuple[int, ...], rows: Array, axis: int) -> Array:
    ids, rows = jnp.asarray(tokens), rows.astype(table.dtype)
    return table.at[:, ids].set(rows.T) if axis else table.at[ids].set(rows)


def adapters_of(params: Params) -> dict[str, Params]:
    """The low-rank adapter of each map, by the path of the map."""
    found: dict[str, Params] = {}
    for path, leaf in _flat(params[ADAPTER]).items():
        module, _, name = path.rpartition("/")
        if name in _LOW_RANK:
            found.setdefault(module, {})[name] = leaf
    return found


def in_full(params: Params) -> dict[str, Array]:
    """The parts of the base that train, by path: leaves read in place of the base's, and rows."""
    leaves = _flat(params[ADAPTER]).items()
    return {path: leaf for path, leaf in leaves if path.rpartition("/")[2] not in _LOW_RANK}


def _flat(tree: Params) -> dict[str, Any]:
    """Leaves by their paths with slashes."""
    return dict(flatten_dict(tree, sep="/"))


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
