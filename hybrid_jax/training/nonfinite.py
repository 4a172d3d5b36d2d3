"""The guard against NaN and infinity: an update whose loss or gradient is not finite changes nothing.

The device reports the first bad tensor as one small number among the metrics; names are looked up on the host,
and only when something is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hybrid_jax.core.errors import UserError

METRIC = "nonfinite"  # "<phase>/nonfinite": a place in `tensor_names`, their number for the loss, or FINE
FINE = -1


class NonFiniteError(UserError):
    """A loss, gradient or parameter is NaN or infinite; the update that met it changed nothing."""


def tensor_names(params: Mapping[str, Any]) -> list[str]:
    """Names every parameter, ``layer_3/attention/query/kernel``, in the order in which gradients reach them.

    Names begin with their group, unless that is "model". Layers come from the last to the first, embeddings at
    the end: where a gradient breaks, the tensors after it only follow, so the first bad one is the one to know.
    """
    return sorted(map(_name, _paths(params)), key=_distance_from_loss)


def first_nonfinite(
    params: Mapping[str, Any], squares: Mapping[str, Any], losses: Float[Array, "..."]
) -> Int[Array, ""]:
    """Computes the metric: the place of the first bad gradient, or else whether a loss is bad.

    Args:
        params: every group, of which only the structure matters.
        squares: the sum of squares of each gradient in the groups that train.
        losses: the terms of the loss.
    """
    names = tensor_names(params)
    sums = dict(zip(map(_name, _paths(squares)), jax.tree.leaves(squares), strict=True))
    places = jnp.asarray([place for place, name in enumerate(names) if name in sums], jnp.int32)
    bad = ~jnp.isfinite(jnp.stack([sums[name] for name in names if name in sums]))
    bad_loss = ~jnp.isfinite(losses).all()
    of_loss = jnp.where(bad_loss, len(names), FINE)
    return jnp.where(bad.any(), places[jnp.argmax(bad)], of_loss).astype(jnp.int32)


def check(step: int, phase: str, place: int, numbers: Mapping[str, float], params: Mapping[str, Any]) -> None:
    """Raises if the update of ``step`` met something that is not finite.

    Args:
        step: whose update it was.
        phase: whose step it was.
        place: the metric.
        numbers: the other metrics, on the host.
        params: the parameters by group as they are now.

    Raises:
        NonFiniteError: step, phase, the first bad tensor by name, and what to try.
    """
    if place == FINE:
        return
    names = tensor_names(params)
    damaged = _nonfinite_parameters(params)
    if damaged:
        what = f"the parameter {next(name for name in names if name in damaged)} is not finite"
        advice = "start from weights that are"
    else:
        bad = [f"the gradient of {names[place]} is not finite"] if place < len(names) else []
        bad += [
            f"{name.removeprefix(f'{phase}/')} is {number}"
            for name, number in numbers.items()
            if name.endswith("loss") and not math.isfinite(number)
        ]
        what = ", ".join(bad or ["the loss is not finite"])
        advice = (
            f"go on with a smaller phases.{phase}.optimizer.learning_rate or max_grad_norm by --allow-change "
            "(in Python allow_change=True), or in another run_dir by start_from; model.dtype needs a new run"
        )
    raise NonFiniteError(
        f"step {step} ({phase}): {what}; the update was left out and nothing saved after it: a rerun repeats "
        f"this step; {advice}"
    )


def _nonfinite_parameters(params: Mapping[str, Any]) -> set[str]:
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(params)):  # the next step failed and consumed them
        return set()
    finite = jax.device_get(jax.jit(_all_finite)(params))
    return {_name(path) for path, fine in jax.tree_util.tree_leaves_with_path(finite) if not fine}


def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: tuple[Any, ...]) -> str:
    keys = [str(getattr(key, "key", key)) for key in path]
    return "/".join(keys[1:] if keys[0] == "model" and len(keys) > 1 else keys)


def _distance_from_loss(name: str) -> float:
    """Orders parameters as gradients reach them: heads and last norms, layers downwards, embeddings."""
    if found := re.search(r"_(\d+)(/|$)", name):
        return -float(found[1])
    return math.inf if "embed" in name else -math.inf
