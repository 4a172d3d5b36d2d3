"""Silences what Orbax and TensorStore print of errors that they also raise."""

from __future__ import annotations

import logging
import sys
from typing import Any

_LOGGERS = ("absl", "asyncio", "concurrent.futures")  # they narrate every save, too


def silence() -> None:
    """Lets only what is raised be heard; may be called again."""
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _UnlessLate):
        sys.unraisablehook = _UnlessLate(sys.unraisablehook)


class _UnlessLate:
    """Passes on all but one error: a write that ends after another one has failed finds its loop closed."""

    def __init__(self, before: Any):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._before(unraisable)
