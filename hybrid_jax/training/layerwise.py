"""Optimizers over layers that are kept as one stack (`models.stacking`).

An optimizer may look at the shape of a parameter: Muon turns matrices, Adafactor keeps
rows and columns. So a stack is updated a layer at a time, by `jax.vmap`: the numbers are those of a list.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from hybrid_jax.models.base import Params
from hybrid_jax.models.stacking import STACK


def layer_by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes ``transform`` act on layers in a stack as on layers in a list."""

    def init(params: Any) -> Any:
        stack, others = _picked(params, True), _picked(params, False)
        if not stack:
            return transform.init(params)
        return {STACK: jax.vmap(transform.init)(stack), "others": transform.init(others)}

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        stack = _picked(updates, True)
        if not stack:
            return transform.update(updates, state, params)
        stack, stack_state = jax.vmap(transform.update)(stack, state[STACK], _picked(params, True))
        others = _picked(updates, False)
        others, others_state = transform.update(others, state["others"], _picked(params, False))
        return _merged(stack, others), {STACK: stack_state, "others": others_state}

    return optax.GradientTransformation(init, update)


def _picked(tree: Params, stacked: bool) -> Params:
    """Only the stacks, or only what is in none."""
    picked = {}
    for name, part in tree.items():
        if name == STACK:
            part = part if stacked else {}
        elif isinstance(part, dict):
            part = _picked(part, stacked)
        elif stacked:
            continue
        if not isinstance(part, dict) or part:
            picked[name] = part
    return picked


def _merged(a: Any, b: Any) -> Params:
    both = {name: _merged(a[name], b[name]) for name in a if name in b}
    return {**a, **b, **both}
