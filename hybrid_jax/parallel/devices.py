"""Checks whether JAX can use the devices that it was asked for, or has fallen back to the CPU."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import logging
import os
from collections.abc import Mapping
from importlib.metadata import entry_points

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.cluster import has_tpu_device

ASKED = "JAX_PLATFORMS"
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")

log = logging.getLogger(__name__)


def check_devices(*, expect_accelerator: bool = True, environment: Mapping[str, str] = os.environ) -> None:
    """Uses the devices once, so that what is wrong with them is said in one line.

    Args:
        expect_accelerator: warns of a fall-back to the CPU where an accelerator was to be expected.
        environment: of the process.

    Raises:
        UserError: ``JAX_PLATFORMS`` names a platform that is unknown, not installed or without a device; or JAX
            cannot use the devices that it finds.
    """
    asked = [name for name in environment.get(ASKED, "").split(",") if name]
    check_platforms(asked)
    import jax

    try:
        backend = jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # of JAX, an AssertionError without any text
        reason = " ".join(str(error).split()) or "no device of that kind is visible"
        what = f"{ASKED}={','.join(asked)}" if asked else "no device can be used"
        raise UserError(f"{what}: {reason}") from error
    if expect_accelerator and backend == "cpu" and asked[:1] != ["cpu"] and (reason := missed_accelerator()):
        log.warning("running on the CPU: %s (JAX_PLATFORMS=cpu says that this is meant)", reason)


def check_platforms(asked: list[str]) -> None:
    """Checks the names in ``JAX_PLATFORMS`` before JAX does, which has no words for most mistakes.

    Raises:
        UserError: a name is unknown, or the package that it needs is not installed.
    """
    others = {entry.name for entry in entry_points(group="jax_plugins")}
    for name in asked:
        if name in ("cuda", "gpu") and not has_cuda_plugin() and "cpu" not in asked:
            raise UserError(
                f"{ASKED}={','.join(asked)} needs JAX with CUDA, which is not installed: "
                "pip install -e '.[cuda]' in the checkout, or unset it to run on the CPU"
            )
        if name == "tpu" and not _is_installed("libtpu"):
            raise UserError(
                f"{ASKED}={','.join(asked)} needs JAX with libtpu, which is not installed: "
                "pip install -e '.[tpu]' in the checkout, or unset it to run on the CPU"
            )
        if name not in _PLATFORMS and name.lower() not in {other.lower() for other in others}:
            known = sorted({*_PLATFORMS, *others})
            close = difflib.get_close_matches(name.strip().lower(), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"{ASKED} holds the unknown platform {name!r}; {hint}known: {', '.join(known)}")


def missed_accelerator() -> str | None:
    """Says why a run on the CPU may be a mistake: an accelerator or the package for one is there."""
    gpus = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if has_cuda_plugin():
        return (
            f"JAX with CUDA is installed but cannot use the GPU ({gpus[0]}); see what nvidia-smi says"
            if gpus
            else "JAX with CUDA is installed but finds no GPU; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if gpus:
        why = f"there is an NVIDIA GPU ({gpus[0]}), but JAX has no CUDA"
        return f"{why}: pip install -e '.[cuda]' in the checkout"
    if has_tpu_device() and not _is_installed("libtpu"):
        return "there is a TPU, but JAX has no libtpu: pip install -e '.[tpu]' in the checkout"
    if _is_installed("libtpu"):
        return "libtpu is installed but finds no TPU; another process may hold it"
    return None


def has_cuda_plugin() -> bool:
    """Tells whether JAX's package for NVIDIA GPUs is installed."""
    return any(map(_is_installed, _CUDA_PLUGINS))


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
