"""Prompt templates with named places: the texts put in are never read as places or as code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hybrid_jax.core.errors import UserError

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


def places(template: str) -> list[str]:
    """The names in braces, in order, each as often as it is written."""
    return _PLACE.findall(template)


def filled(template: str, values: Mapping[str, str]) -> str:
    """``template`` with every ``{name}`` replaced by ``values[name]``, in one pass.

    Raises:
        UserError: a name has no value.
    """
    for name in places(template):
        if name not in values:
            known = ", ".join(sorted(values))
            raise UserError(
                f"the template's {{{name}}} must be the name of a text or a column, got only {known}"
            )
    return _PLACE.sub(lambda match: values[match[1]], template)
