"""How the policy of a run samples, and the user's own words over it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

from hybrid_jax.core.config import apply_overrides, parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.rewards import catalogue as rewards  # noqa: F401  a sampler may choose by one
from hybrid_jax.sampling import catalogue  # noqa: F401  fills SAMPLERS
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.sampling.base import SAMPLERS, Sampler, alone


@dataclass(frozen=True)
class _SamplerSettings:
    sampler: Annotated[Any, SAMPLERS]


def run_sampler(settings: dict[str, Any], context: int | None, trust: Container[str]) -> Sampler:
    """The sampler of the run: that of its evaluation, or of the first phase that samples."""
    components = [settings.get("evaluation"), *(settings.get("phases") or {}).values()]
    found = (component.get("sampler") for component in components if component)
    sampler = next((sampler for sampler in found if sampler), None)
    if sampler is None:
        return default_sampler(context)
    return alone(parse(_SamplerSettings, {"sampler": sampler}, trust=trust).sampler)


def default_sampler(context: int | None) -> Ancestral:
    """Where nothing says how to sample: at most half of the context, at most 64 tokens."""
    return Ancestral(max_new_tokens=64 if context is None else max(min(64, context // 2), 1))


def _settings_of(name: Any) -> set[str]:
    """The settings that a sampler has; what is no sampler is refused."""
    try:
        entry = SAMPLERS.find(str(name), EVERYTHING)
    except UserError as error:
        raise UserError(f"sampler: {error}") from error
    return {field.name for field in fields(entry)} if is_dataclass(entry) else set()


def overridden(sampler: Sampler, overrides: Sequence[str]) -> Sampler:
    """``sampler`` with ``sampler.a=value`` settings over its own; another one keeps those that it knows.

    The overrides are the user's own words, so a name in them may run code.
    """
    own = to_dict(_SamplerSettings(sampler))["sampler"]
    for name in (override.partition("=")[0] for override in overrides):
        if name in own:
            raise UserError(f"unknown setting {name!r}; did you mean 'sampler.{name}'?")
    settings = apply_overrides({"sampler": own}, overrides, _SamplerSettings, EVERYTHING)
    chosen = settings["sampler"]
    if isinstance(chosen, Mapping) and chosen.get("name") != own["name"]:
        kept = {name: value for name, value in own.items() if name in _settings_of(chosen["name"])}
        start = {"sampler": {**kept, "name": chosen["name"]}}
        settings = apply_overrides(start, overrides, _SamplerSettings, EVERYTHING)
    return parse(_SamplerSettings, settings, trust=EVERYTHING).sampler
