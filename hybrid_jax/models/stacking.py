"""Layers as a list and as a stack: two arrangements of the same parameters.

A list is ``{"layer_0": …, "layer_1": …}``. `jax.lax.scan` wants equal layers in one array: with a period of p
(the pattern of windows, say, repeats every p layers) layer i is item ``i // p`` of ``layers/layer_{i % p}``.
Files, adapters and exports know the list; only a decoder with ``scan_layers`` computes with the stack.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import Params
from hybrid_jax.models.lora import ADAPTER

STACK = "layers"
_LAYER = re.compile(r"layer_(\d+)")


def stack_layers(params: Params, period: int) -> Params:
    """A list as a stack; also of shapes (`jax.ShapeDtypeStruct`).

    Raises:
        UserError: layers of one place in the period are not alike, such as adapters on some of them only.
    """
    return _rearranged(params, lambda tree: _stacked(tree, period), _is_list)


def unstack_layers(params: Params, period: int) -> Params:
    """A stack as a list."""
    return _rearranged(params, lambda tree: _listed(tree, period), lambda tree: STACK in tree)


def _rearranged(
    params: Params, rearrange: Callable[[Params], Params], fits: Callable[[Params], bool]
) -> Params:
    rearranged = rearrange(params) if fits(params) else dict(params)
    if ADAPTER in params and fits(params[ADAPTER]):
        rearranged[ADAPTER] = rearrange(params[ADAPTER])
    return rearranged


def _is_list(tree: Params) -> bool:
    return any(_LAYER.fullmatch(name) for name in tree)


def _stacked(tree: Params, period: int) -> Params:
    layers = {int(found[1]): tree[name] for name in tree if (found := _LAYER.fullmatch(name))}
    others = {name: part for name, part in tree.items() if not _LAYER.fullmatch(name)}
    turns = -(-(max(layers) + 1) // period)
    stack = {}
    for place in range(period):
        alike = [layers.pop(turn * period + place, None) for turn in range(turns)]
        if len({str(jax.tree.structure(layer)) for layer in alike}) > 1:
            raise UserError("execution.scan_layers needs adapters on all layers alike; check lora.targets")
        if alike[0] is not None:
            stack[f"layer_{place}"] = _stack(alike)
    return {**others, STACK: stack}


def _stack(layers: list[Any]) -> Any:
    """Leaf by leaf, each layer's array let go as soon as it lies in the stack."""
    leaves, structure = zip(*(jax.tree.flatten(layer) for layer in layers), strict=True)
    leaves = [list(layer) for layer in leaves]
    stacked = []
    for i in range(len(leaves[0])):
        arrays = [layer[i] for layer in leaves]
        for layer in leaves:
            layer[i] = None
        stacked.append(_stack_arrays(arrays))
    return jax.tree.unflatten(structure[0], stacked)


def _stack_arrays(arrays: list[Any]) -> Any:
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
    return jnp.stack(arrays)


def _listed(tree: Params, period: int) -> Params:
    listed = {name: part for name, part in tree.items() if name != STACK}
    for name, layers in tree[STACK].items():
        place, turns = int(name.removeprefix("layer_")), len(jax.tree.leaves(layers)[0])
        for turn in range(turns):
            listed[f"layer_{turn * period + place}"] = jax.tree.map(lambda x, i=turn: x[i], layers)
    return listed


def cast_kernels(params: Params, dtype: str) -> Params:
    """Kernels and embeddings in the dtype that the layers cast them to; scales and biases as they are."""

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        is_cast = path[-1].key in ("kernel", "embedding", "a", "b") and leaf.dtype == jnp.float32
        return leaf.astype(dtype) if is_cast else leaf

    return jax.tree_util.tree_map_with_path(cast, params)
