"""Shared by the adapters of other libraries: their packages, and code of the user's that makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hybrid_jax.core.registry import Registry
from hybrid_jax.metrics.packages import import_package

# A class or a function, ``my_module:Mine``, to be called with the arguments that its library says.
FACTORIES: Registry[Callable[..., Any]] = Registry("factory of environments", as_it_is=True)


def package_of(adapter: str, module: str) -> Any:
    """Imports the package of an adapter.

    Raises:
        UserError: it is not installed; the line names the extra.
    """
    return import_package(module, f"the {adapter} environment", "pip install -e '.[envs]' in the checkout")


def check_one(identity: str | None, factory: Any) -> None:
    """Checks that an environment is named by its id or by a factory, and that an id imports nothing.

    Raises:
        ValueError: it is named twice, not at all, or by code as its id.
    """
    if (identity is None) == (factory is None):
        given = "both" if factory is not None else "neither"
        raise ValueError(f"id must be given, or factory in its place, got {given}")
    if identity is not None and ":" in identity:
        raise ValueError(f"id must be a name without a colon, got {identity!r}; code of your own is a factory")
