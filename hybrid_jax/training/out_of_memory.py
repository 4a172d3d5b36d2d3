"""Says in one line what to do when a device has too little memory."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from hybrid_jax.core.errors import UserError

_ADVICE = (
    "what helps: model.execution.remat full, more microbatches, smaller batches or lengths, mesh.fsdp over "
    "more devices (a run that has begun takes these by --allow-change), or model.dtype bfloat16 in a new run; "
    "python -m hybrid_jax.plan --config FILE --search finds what fits"
)
# "while trying to allocate 1234 bytes", "Attempting to reserve 1.23G", "Used 20.5G of 15.75G hbm"
_SIZE = re.compile(r"allocat\w* ([\d.]+ ?\w*)|reserve ([\d.]+ ?\w*)|(Used [\d.]+\w* of [\d.]+\w*)")
_PROGRAM = re.compile(r"\bjit_?\(?(\w+)")


class OutOfMemory(UserError):
    """A program needs more memory than a device has, when it is compiled or when it runs."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Says what ran out of memory, and which settings would help.

    Raises:
        OutOfMemory: in the place of XLA's error, which it keeps as its cause.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not re.search(r"RESOURCE_EXHAUSTED|[Oo]ut of memory", text):
            raise
        program = _PROGRAM.search(text)
        found = _SIZE.search(text)
        size = next(filter(None, found.groups())) if found else None
        where = f"{what}, program {program[1]}" if program else what
        details = f" ({size})" if size else ""
        raise OutOfMemory(f"{where}: a device is out of memory{details}; {_ADVICE}") from error


def check_state_fits(shapes: Any) -> None:
    """Checks that a state is not larger than the machine, on a CPU, where Linux would end the process unasked.

    Args:
        shapes: of the state's arrays.

    Raises:
        OutOfMemory: it is.
    """
    if jax.default_backend() != "cpu":
        return
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if isinstance(leaf, jax.ShapeDtypeStruct)]
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise OutOfMemory(
            f"the state of the run needs {needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}; "
            "what helps: a smaller model, or devices with more memory"
        )
