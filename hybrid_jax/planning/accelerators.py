"""The peaks of accelerators: memory, arithmetic, bandwidths.

Peaks are those that the makers publish for a chip. TPUs: https://docs.cloud.google.com/tpu/docs, the pages v4,
v5e, v5p, v6e and tpu7x. GPUs: the data sheets of A100 (80 GB SXM), H100 SXM and H200 SXM, dense bfloat16. The
interconnect's is one way: half of a TPU's bidirectional figure over all its links, half of NVLink's. What a
chip has of the data centre's network is published for v5p, and for v5e and v6e as that of a pod of 256 chips.

A TPU's ``memory_bytes`` are not the published ones but what XLA can use: its compiler (libtpu 0.0.42) named it
when it refused a program that was too large. A GPU's are what its runtime says, where there is one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """The peaks of one chip.

    Attributes:
        name: as in a topology ("v5e").
        memory_bytes: bytes that a program can use on one device of the chip.
        peak_flops: bfloat16 FLOPs a second.
        memory_bandwidth: bytes a second between memory and cores.
        interconnect_bandwidth: bytes a second that the chip sends to other chips of its slice.
        devices: number of devices that JAX sees in the chip; they share all but the memory.
        source: "published", or "measured" on this machine.
        network_bandwidth: bytes a second that the chip sends to other slices; None where nothing is published.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    memory_bandwidth: float
    interconnect_bandwidth: float
    devices: int = 1
    source: Literal["published", "measured"] = "published"
    network_bandwidth: float | None = None


V4 = Accelerator("v4", 30.75 * GIB, 275e12, 1200e9, 300e9)
V5E = Accelerator("v5e", 15.75 * GIB, 197e12, 819e9, 200e9, network_bandwidth=3.125e9)
V5P = Accelerator("v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, network_bandwidth=6.25e9)
V6E = Accelerator("v6e", 31.25 * GIB, 918e12, 1638e9, 400e9, network_bandwidth=12.5e9)
TPU7X = Accelerator("tpu7x", 94.75 * GIB, 2307e12, 7380e9, 600e9, devices=2)
A100 = Accelerator("A100", 80e9, 312e12, 2039e9, 300e9)
H100 = Accelerator("H100", 80e9, 989e12, 3350e9, 450e9)
H200 = Accelerator("H200", 141e9, 989e12, 4800e9, 450e9)

TPUS = {tpu.name: tpu for tpu in (V4, V5E, V5P, V6E, TPU7X)}
_DEVICE_KINDS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": TPU7X,
}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """Finds a chip by ``device.device_kind``, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; else None."""
    if device_kind in _DEVICE_KINDS:
        return _DEVICE_KINDS[device_kind]
    found = (gpu for gpu in (A100, H100, H200) if gpu.name in device_kind and "PCIe" not in device_kind)
    return next(found, None)


def local_accelerator(devices: Sequence[Any]) -> Accelerator | None:
    """Finds the chip of this machine's devices, None if unknown.

    A CPU has no published peaks: it is measured, which takes about a second.
    """
    device = devices[0]
    if device.platform == "cpu":
        return measured(len(devices))
    known = accelerator_of(device.device_kind)
    memory = usable_memory(device)
    return known if known is None or memory is None else replace(known, memory_bytes=memory)


def usable_memory(device: Any) -> float | None:
    """The most bytes that the runtime will allocate on a device; None where it does not say."""
    return (device.memory_stats() or {}).get("bytes_limit")


def measured(count: int) -> Accelerator:
    """Measures the CPU, which ``count`` devices share, by a matrix product and passes over memory."""
    import jax
    import jax.numpy as jnp

    cpu = jax.local_devices(backend="cpu")[0]
    size, passes = 1536, 8
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), cpu)
    vector = jax.device_put(jnp.ones(2**25, jnp.float32), cpu)
    # Many passes in one call, over more bytes than any cache holds: a single one would measure its dispatch.
    in_place = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, y: y + 1.0, x))
    flops = 2 * size**3 / _fastest(jax.jit(jnp.matmul), matrix, matrix)
    bandwidth = 2 * passes * vector.nbytes / _fastest(in_place, vector)
    # The devices are threads of one CPU: they share its memory, and what one sends is copied there.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Accelerator(
        "cpu", memory / count, flops / count, bandwidth / count, bandwidth / count, source="measured"
    )


def _fastest(function: Any, *arguments: Any, seconds: float = 0.4) -> float:
    """The seconds of the fastest call among those that fit into about ``seconds``."""
    function(*arguments).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        function(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best
