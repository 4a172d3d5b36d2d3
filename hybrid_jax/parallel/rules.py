"""Logical axes: which axis of an array lies on which axis of the mesh.

Every axis of a parameter and of the large activations has a name, and `ShardingRules` says over which mesh axes
an axis of that name is split. A `Placement` (mesh and rules) is in force while a function is traced; where
none is, on one device, nothing is constrained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])
MeshAxes = tuple[str, ...]
AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes of each logical axis; an axis that they do not divide stays whole."""

    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = ()
    width: MeshAxes = ()  # of activations
    heads: MeshAxes = ("tensor",)  # of queries; in a parameter, heads × channels
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    embed: MeshAxes = ("fsdp",)  # the width, in a parameter
    experts: MeshAxes = ()

    def spec(self, mesh: Mesh, shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
        """Where an array of this shape lies, its axes having these names (None: whole)."""
        assert len(shape) == len(names), (tuple(shape), tuple(names))
        entries, used = [], set()
        for size, name in zip(shape, names, strict=True):
            axes = () if name is None else tuple(a for a in getattr(self, name) if mesh.shape[a] > 1)
            while axes and (size % _size(mesh, axes) or used.intersection(axes)):
                axes = axes[:-1]
            used.update(axes)
            entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
        return PartitionSpec(*entries)


TRAINING = ShardingRules()
NAMES = tuple(field.name for field in fields(ShardingRules))

# How the weights of a rollout lie, by the name that a config gives: as in training; split over "tensor" alone,
# so that no token waits for an all-gather of weights; or whole on every device, each answering its own rows.
ROLLOUTS = {
    "fsdp": TRAINING,
    "tensor": replace(TRAINING, embed=()),
    "replicated": ShardingRules(batch=AXES, heads=(), kv_heads=(), mlp=(), vocab=(), embed=()),
}


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules for what lies on it."""

    mesh: Mesh
    rules: ShardingRules = TRAINING

    def sharding(self, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(self.mesh, shape, names))

    @property
    def platform(self) -> str:
        """Of the devices that a traced function is for: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def num_batch_shards(self) -> int:
        return _size(self.mesh, self.rules.batch)


_active = jax.make_user_context(None)  # belongs to the key of everything that is traced under it


def current_placement() -> Placement | None:
    """What the function being traced is for; None is the default device."""
    return _active.value


def target_platform() -> str:
    """Of the devices that the function being traced will run on."""
    placement = current_placement()
    return jax.default_backend() if placement is None else placement.platform


def under(placement: Placement | None, function: F) -> F:
    """``function``, traced and run with ``placement`` in force."""

    @functools.wraps(function)
    def placed(*args, **kwargs):
        with _active(placement):
            return function(*args, **kwargs)

    return placed  # pyright: ignore[reportReturnType]


def shard(x: Array, *names: str | None) -> Array:
    """Constrains where an activation lies: ``shard(x, "batch", "length", "width")``."""
    placement = current_placement()
    if placement is None or placement.mesh.size == 1:
        return x
    return lax.with_sharding_constraint(x, placement.sharding(x.shape, names))


def _size(mesh: Mesh, axes: MeshAxes) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))
