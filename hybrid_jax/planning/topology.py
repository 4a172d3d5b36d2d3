"""The devices that a plan is for: those of TPU slices that are not here, or the local ones."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import suggest
from hybrid_jax.planning.accelerators import TPUS, Accelerator, local_accelerator

LOCAL = "local"
_MOST_SLICES = 256
# Chips along each axis of the largest slice. libtpu ends the process where a slice is larger or has another
# number of axes, so both are checked before.
_LARGEST = {
    "v4": (16, 16, 16),
    "v5e": (16, 16),
    "v5p": (16, 16, 24),
    "v6e": (16, 16),
    "tpu7x": (16, 24, 24),
}
# Without hardware libtpu would ask Google Cloud for its metadata and complain on stderr about having none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may run at a time, since none claims any hardware
}


@dataclass(frozen=True)
class Topology:
    """Devices that programs can be compiled for, and the peaks of each chip (None where they are not known)."""

    name: str
    devices: tuple[Any, ...]
    accelerator: Accelerator | None

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform

    @property
    def devices_per_chip(self) -> int:
        """The number of devices in a chip; 1 where the chip is not known."""
        return 1 if self.accelerator is None else self.accelerator.devices

    @property
    def chips(self) -> int:
        """The number of chips that the devices belong to."""
        return math.ceil(len(self.devices) / self.devices_per_chip)

    @property
    def slices(self) -> int:
        """The number of groups of devices that only the network between machines joins."""
        return len({getattr(device, "slice_index", 0) for device in self.devices})


def find_topology(name: str) -> Topology:
    """Finds the devices of ``local`` or of a TPU slice.

    A slice is ``v5e:4x4`` (v5e and v6e have 2 axes) or ``v5p:4x4x4`` (v4, v5p and tpu7x have 3). Two slices are
    ``2xv5p:4x4x4``.

    Raises:
        UserError: there is no such slice, or no compiler for it (extra ``tpu``).
    """
    if name == LOCAL:
        import jax

        devices = tuple(jax.devices())
        return Topology(name, devices, local_accelerator(devices))
    slices, kind, sizes = _parse(name)
    return Topology(name, tuple(_tpu_devices(name, slices, kind, sizes)), TPUS[kind])


def _parse(name: str) -> tuple[int, str, tuple[int, ...]]:
    """The number of slices, the kind of TPU and the chips along each axis of a slice."""
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([^:]*):?(.*)", name, re.DOTALL)
    assert found is not None, name
    slices, kind, shape = int(found[1] or 1), found[2], found[3]
    if kind not in _LARGEST:
        known = suggest(kind, [LOCAL, *_LARGEST])
        raise UserError(f"topology must be local or <TPU>:<chips>, as in v5e:4x4, got {name!r}; {known}")
    if slices > _MOST_SLICES:
        raise UserError(f"topology must have at most {_MOST_SLICES} slices, got {slices} in {name!r}")
    largest = _LARGEST[kind]
    example = f"{kind}:{'x'.join(['4'] * len(largest))}"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != len(largest):
        raise UserError(
            f"topology {kind} must have {len(largest)} axes of chips, as in {example}, got {name!r}"
        )
    sizes = tuple(map(int, shape.split("x")))
    if any(size > most for size, most in zip(sorted(sizes), sorted(largest), strict=True)):
        raise UserError(f"topology {kind} must be at most {'x'.join(map(str, largest))} chips, got {name!r}")
    return slices, kind, sizes


def _tpu_devices(name: str, slices: int, kind: str, sizes: tuple[int, ...]) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning for TPUs needs their compiler: pip install -e '.[tpu]' in the checkout")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    bounds = (*(min(size, 2) for size in sizes[:2]), 1)  # chips of a host
    options: dict[str, Any] = {
        "chip_config_name": "megacore" if kind in ("v4", "v5p") else "default",
        "chips_per_host_bounds": bounds,
    }
    if slices > 1:
        options["num_slices"] = slices
    one = f"{kind}:{'x'.join(map(str, sizes))}"
    try:
        found = topologies.get_topology_desc(topology_name=one, platform="tpu", **options)
    except Exception as error:  # whatever libtpu says
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"topology {name!r} is impossible: {reason}") from error
    return found.devices
