"""Packages that few need, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from hybrid_jax.core.errors import UserError


def import_package(
    module: str, purpose: str, install: str = "pip install -e '.[rewards]' in the checkout"
) -> Any:
    """The module, or a `UserError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs {package}, which is not installed: {install}") from error
