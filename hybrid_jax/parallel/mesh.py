"""Where arrays live: parameters on every device, batches split over the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.core.registry import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share the rows of a batch."""

    data: int = 1

    def __post_init__(self):
        if self.data < 1:
            raise ValueError(f"data must be at least 1, got {self.data}")

    def mesh(self) -> Mesh:
        devices = jax.devices()
        if self.data > len(devices):
            raise UserError(f"mesh.data must be at most the {len(devices)} devices here, got {self.data}")
        return Mesh(np.asarray(devices[: self.data]), ("data",))

    def split(self, batch: T) -> T:
        """Puts host arrays on the devices, each with its share of the rows."""
        return self._put(batch, PartitionSpec("data"))

    def replicate(self, tree: T) -> T:
        """Puts a tree on every device."""
        return self._put(tree, PartitionSpec())

    def _put(self, tree: T, spec: PartitionSpec) -> T:
        if self.data == 1:
            return jax.device_put(tree, jax.devices()[0])
        return jax.device_put(tree, NamedSharding(self.mesh(), spec))
