"""Measures what a run takes of its machine: peak memory, and the share of the peak arithmetic."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from typing import Any

import jax

from hybrid_jax.training.compilation import Compilations

# Dense bfloat16 FLOPs a second of one device as JAX counts them, as the makers publish: a TPU7x chip is two
# devices, a v2 or v3 chip too. By a pattern of ``device.device_kind``, the first that matches.
_PEAKS = {
    r"TPU v2": 22.5e12,
    r"TPU v3": 61.5e12,
    r"TPU v4 lite": 138e12,
    r"TPU v4": 275e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5": 459e12,
    r"TPU v6 ?(lite|e)": 918e12,
    r"TPU7x": 1153.5e12,
    r"A100": 312e12,
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H[12]00": 989e12,
    r"B200": 2250e12,
    r"L40S": 362e12,
    r"\bL4\b": 121e12,
}


def peak_flops(devices: Sequence[Any], peak_tflops: float | None = None) -> float | None:
    """The bfloat16 FLOPs a second of all ``devices`` at best; None where their kind is unknown.

    Args:
        devices: JAX devices, all of one kind.
        peak_tflops: 10¹² FLOPs a second of each, in place of the published figure.
    """
    if peak_tflops is not None:
        return len(devices) * peak_tflops * 1e12
    kind = devices[0].device_kind
    found = (peak for pattern, peak in _PEAKS.items() if re.search(pattern, kind))
    each = next(found, None)
    return None if each is None else len(devices) * each


def peak_memory(devices: Sequence[Any]) -> dict[str, float]:
    """Reads the most bytes that were held so far, as far as this process can see.

    ``memory/peak_bytes`` is the peak of the fullest local device, where the runtime counts it. Elsewhere, as on
    a CPU, ``memory/host_peak_bytes`` is the peak of the resident memory of the whole process.
    """
    stats = [device.memory_stats() or {} for device in devices]
    if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
        return {"memory/peak_bytes": float(max(peaks))}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory/host_peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


class Machine:
    """Gives the records of a run their numbers about the machine.

    Args:
        devices: all devices that the run computes on, of all processes.
        peak_tflops: 10¹² FLOPs a second of each, in place of the published figure.
    """

    def __init__(self, devices: Sequence[Any], peak_tflops: float | None = None):
        self._peak_flops = peak_flops(devices, peak_tflops)
        self._local = [device for device in devices if device in jax.local_devices()]
        self._compilations = Compilations()

    def numbers(self) -> dict[str, float]:
        """Peak memory, the programs compiled since the start, and the seconds that compiling took."""
        compiled = {"compile/count": self._compilations.count, "compile/seconds": self._compilations.seconds}
        return {**peak_memory(self._local), **compiled}

    def utilisation(self, flops: float, seconds: float) -> float | None:
        """Model FLOPs utilisation: ``flops`` in ``seconds`` as a share of the peak (PaLM, appendix B)."""
        return None if self._peak_flops is None else flops / seconds / self._peak_flops
