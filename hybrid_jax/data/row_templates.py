"""Texts made of the fields of a row: a field as it is, or a template that names several."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.json_text import shown
from hybrid_jax.core.registry import suggest


def text_of(
    row: Mapping[str, Any], field: str | None, template: str | Sequence[str] | None, where: str
) -> str | None:
    """The text of a row: its field, or a template of its fields; None where neither is named.

    Raises:
        UserError: a field is missing, or is no text (nor, in a template, a finite number).
    """
    if template is not None:
        return _formatted(row, _templates(template), where)
    if field is None:
        return None
    _check_field(row, field, where)
    if not isinstance(row[field], str):
        raise UserError(
            f"{where}: field {field!r} must be a text, got {shown(row[field])}{_remedy(row[field])}"
        )
    return row[field]


def _formatted(row: Mapping[str, Any], templates: Sequence[str], where: str) -> str:
    """The row in the first template whose fields are all there, else in the last."""
    complete = (t for t in templates[:-1] if all(row.get(name) not in (None, "") for name in _places(t)))
    template = next(complete, templates[-1])
    for name in _places(template):
        _check_field(row, name, where)
        value = row[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(value, str) and not is_number:
            problem = f"field {name!r} must be a text or a number for a template, got {shown(value)}"
            raise UserError(f"{where}: {problem}{_remedy(value)}")
    try:
        return template.format(**row)
    except ValueError as error:  # {x:.2f} of a text, perhaps
        raise UserError(f"{where}: the template {template!r} does not fit the row: {error}") from error


def _remedy(value: Any) -> str:
    """The advice for a field that is null."""
    if value is not None:
        return ""
    return (
        "; leave such rows out by filter: [{name: length, column: …, least: 1}], or give a list of templates, "
        "of which one does without it"
    )


def _check_field(row: Mapping[str, Any], field: str, where: str) -> None:
    if field not in row:
        named = "prompt_field and response_field name them, or prompt_template and response_template"
        raise UserError(f"{where}: no field {field!r}; {suggest(field, list(row))}; {named}")


def _templates(template: str | Sequence[str] | None) -> Sequence[str]:
    return [template] if isinstance(template, str) else template or ()


def _places(template: str) -> list[str]:
    """The names in braces."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def check_template(name: str, given: str | Sequence[str] | None) -> None:
    """Checks that a setting holds templates of plain fields; raises `ValueError`."""
    if given is not None and not given:
        raise ValueError(f"{name} must hold a template, got none")
    for template in _templates(given):
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(
                f"{name} must be a format of the row's fields, got {template!r}: {error}"
            ) from error
        if not all(field is None or field.isidentifier() for _, field, _, _ in parts):
            raise ValueError(f"{name} must name plain fields such as {{question}}, got {template!r}")
        if any(conversion or "{" in (how or "") for _, _, how, conversion in parts):
            raise ValueError(f"{name} must write its fields as they are, got {template!r}")
