"""Logical axes: they say which axis of an array is split over which axes of the mesh.

Every axis of a parameter and of the large activations has a name, and `ShardingRules` says over which mesh axes
an axis of that name is split. A `Placement` (mesh and rules) is in force while a function is traced; without
one, on a single device, nothing is constrained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
MeshAxes = tuple[str, ...]
AxesOf = Callable[[str, tuple[int, ...]], Sequence[str | None]]  # names of the axes, by path and shape
AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; an axis that they do not divide stays whole."""

    # Axes of parameters.
    embed: MeshAxes = ("fsdp",)  # the width
    heads: MeshAxes = ("tensor",)  # query heads × channels
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)  # also of what the MLP computes
    vocab: MeshAxes = ("tensor",)  # also of scores
    experts: MeshAxes = ()
    # Axes of activations.
    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = ()
    width: MeshAxes = ()
    attention_batch: MeshAxes = ("data", "fsdp")  # of queries, keys, values and the cache
    attention_heads: MeshAxes = ("tensor",)
    attention_kv_heads: MeshAxes = ("tensor",)

    def spec(self, mesh: Mesh, shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
        """Says how an array of this shape is split by the names of its axes; one without a name stays whole."""
        assert len(shape) == len(names), (tuple(shape), tuple(names))
        entries, used = [], set()
        for size, name in zip(shape, names, strict=True):
            axes = () if name is None else tuple(a for a in getattr(self, name) if mesh.shape[a] > 1)
            while axes and (size % _size(mesh, axes) or used.intersection(axes)):
                axes = axes[:-1]
            used.update(axes)
            entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
        while entries and entries[-1] is None:  # as JAX writes it, so that equal specs compare equal
            entries.pop()
        return PartitionSpec(*entries)


TRAINING = ShardingRules()
_ALL_BUT_DATA = ("fsdp", "tensor")

# How the weights of a rollout lie, by the name that a config gives.
ROLLOUTS = {
    # As in training: every token waits until each device has gathered all weights.
    "fsdp": TRAINING,
    # Each device keeps a part of every map and computes with it; only activations travel. Attention stays split
    # over the rows, since its cache is large.
    "tensor": ShardingRules(
        embed=(),
        heads=_ALL_BUT_DATA,
        kv_heads=_ALL_BUT_DATA,
        mlp=_ALL_BUT_DATA,
        vocab=_ALL_BUT_DATA,
        batch=("data",),
    ),
    # Whole on every device, each answering its own rows: nothing travels.
    "replicated": ShardingRules(
        embed=(),
        heads=(),
        kv_heads=(),
        mlp=(),
        vocab=(),
        batch=AXES,
        attention_batch=AXES,
        attention_heads=(),
        attention_kv_heads=(),
    ),
}


@dataclass(frozen=True)
class Placement:
    """A mesh and the rules by which arrays are split over it.

    Within `jax.shard_map` it is ``local``: arrays are a device's own part there, and nothing is constrained.
    """

    mesh: Mesh
    rules: ShardingRules = TRAINING
    local: bool = False

    def sharding(self, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding:
        """The sharding of an array by its shape and the names of its axes."""
        return NamedSharding(self.mesh, self.rules.spec(self.mesh, shape, names))

    def shardings(self, tree: Any, axes_of: AxesOf) -> Any:
        """The sharding of every array of a tree; ``axes_of(path, shape)`` names its axes."""

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            return self.sharding(leaf.shape, axes_of(path_of(path), tuple(leaf.shape)))

        return jax.tree_util.tree_map_with_path(of, tree)

    def shapes(self, tree: Any, axes_of: AxesOf) -> Any:
        """The shapes of a tree with the `shardings` of its arrays."""

        def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape, tree, self.shardings(tree, axes_of))

    def row_sharding(self, ndim: int, rows: int) -> NamedSharding:
        """The sharding of a batch that is split over its rows."""
        return self.sharding((rows, *[1] * (ndim - 1)), ("batch", *[None] * (ndim - 1)))

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def num_row_shards(self) -> int:
        """The number of parts that a batch is split into."""
        return _size(self.mesh, self.rules.batch)

    def with_rules(self, rules: ShardingRules) -> Placement:
        """The same mesh under other rules."""
        return replace(self, rules=rules)


_active = jax.make_user_context(None)  # JAX traces a function again where this value is another


def current_placement() -> Placement | None:
    """The placement that the function being traced is for; None for the default device."""
    return _active.value


def target_platform() -> str:
    """The platform of the devices that the function being traced will run on."""
    placement = current_placement()
    return jax.default_backend() if placement is None else placement.platform


def under(placement: Placement | None, function: F) -> F:
    """Wraps a function so that it is traced and run with ``placement`` in force."""

    @functools.wraps(function)
    def placed(*args, **kwargs):
        with _active(placement):
            return function(*args, **kwargs)

    return placed  # pyright: ignore[reportReturnType]


def as_in_training(function: F) -> F:
    """Wraps a function so that it is traced under the training rules, on the mesh in force."""
    placement = current_placement()
    return function if placement is None else under(placement.with_rules(TRAINING), function)


def shard(x: Array, *names: str | None) -> Array:
    """Constrains how an activation is split, by its axes: ``shard(x, "batch", "length", "width")``."""
    placement = current_placement()
    if placement is None or placement.mesh.size == 1 or placement.local:
        return x
    return lax.with_sharding_constraint(x, placement.sharding(x.shape, names))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def shard_for_use(param: Array, kept: tuple[str | None, ...], used: tuple[str | None, ...]) -> Array:
    """Moves a parameter from the split in which it is ``kept`` to that for its use, and its gradient back.

    With a plain `shard` every device would add up the whole gradient before it keeps its part.
    """
    return shard(param, *used)


shard_for_use.defvjp(
    lambda param, kept, used: (shard(param, *used), None), lambda kept, used, _, grad: (shard(grad, *kept),)
)


def shard_rows(tree: T) -> T:
    """Constrains the arrays of a batch [B ...] to be split over their rows."""
    return jax.tree.map(lambda x: shard(x, "batch", *[None] * (x.ndim - 1)), tree)


def shard_params(params: T, axes_of: AxesOf) -> T:
    """Constrains parameters to be split as the rules in force say."""
    placement = current_placement()
    if placement is None or placement.mesh.size == 1:
        return params
    return lax.with_sharding_constraint(params, placement.shardings(params, axes_of))


def made_in_parts(axes_of: AxesOf, function: Callable[..., T], *arguments: Any) -> T:
    """Calls ``function(*arguments)`` so that each device makes only its own part of the arrays in the result.

    No device ever holds the whole of a tree that is split over many.
    """
    placement = current_placement()
    if placement is None or placement.mesh.size == 1:
        return function(*arguments)
    shardings = placement.shardings(jax.eval_shape(function, *arguments), axes_of)
    return jax.jit(function, out_shardings=shardings)(*arguments)


def path_of(keys: tuple[Any, ...]) -> str:
    """Writes the path of a leaf: ``layer_0/mlp/up/kernel``."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _size(mesh: Mesh, axes: MeshAxes) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))
