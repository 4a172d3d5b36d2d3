"""References: frozen models that hold a trained one back, copies of it or models out of folders.

The references of a phase are its own state: ``RunState.references`` keeps them as ``<phase>/<reference>``. So
two phases that freeze at different times keep different ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.ranges import Count, NonNegative, settings
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families.family import flatten
from hybrid_jax.models.folders import hf
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.rules import Placement, shard_params, under
from hybrid_jax.training.state import RunState


@settings
class Reference:
    """A frozen copy of the policy that holds the trained one back."""

    weight: NonNegative = 1.0  # of its share in the penalty
    frozen_at: Literal["start", "first_step"] = (
        "first_step"  # of the run, or of this phase (the SFT checkpoint)
    )
    refresh_every_cycles: Count | None = None  # copy the policy again each time this phase was entered n times
    refresh_every_steps: Count | None = None  # copy the policy again after so many steps of this phase
    path: str | None = None  # another model in place of a copy: a Hugging Face folder of the same shape

    def __post_init__(self):
        for name in ("refresh_every_cycles", "refresh_every_steps"):
            if self.path is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} must be null for a reference with a path: it never changes")

    @property
    def changes(self) -> bool:
        """Tells whether it is ever copied again."""
        return self.refresh_every_cycles is not None or self.refresh_every_steps is not None

    def is_due(self, cycle: int, entered: bool, steps: int = 0) -> bool:
        """Tells whether to copy the policy again before a step.

        Args:
            cycle: entries into the phase so far.
            entered: another phase took the last step.
            steps: of the phase so far.
        """
        by_cycle = self.refresh_every_cycles is not None and entered and cycle % self.refresh_every_cycles == 0
        return by_cycle or (self.refresh_every_steps is not None and steps % self.refresh_every_steps == 0)


def shares_of(references: Mapping[str, Reference]) -> dict[str, float]:
    """The weight of each reference, together 1."""
    total = sum(reference.weight for reference in references.values())
    return {name: reference.weight / total for name, reference in references.items()}


class References:
    """The references of one phase: when they are frozen, and where the state of the run keeps them.

    Args:
        settings: of each, by name.
        phase: the name of the phase.
        model: of the policy; a reference has its shape.
        placement: of the parameters.
    """

    def __init__(
        self,
        settings: Mapping[str, Reference],
        phase: str,
        model: LanguageModel,
        placement: Placement,
    ):
        self._settings, self._phase, self._model = settings, phase, model
        self._copy = jax.jit(under(placement, self._frozen))

    @property
    def names(self) -> tuple[str, ...]:
        """Their names in `RunState.references`."""
        return tuple(map(self._key, self._settings))

    def init(self, policy: Params) -> dict[str, Params]:
        """Those that a fresh run freezes at its start."""
        at_start = (n for n, r in self._settings.items() if r.frozen_at == "start" and not r.path)
        return {self._key(name): self._frozen(policy) for name in at_start}

    def of(self, state: RunState) -> dict[str, Params]:
        """All of them, by the names in the settings."""
        return {name: state.references[self._key(name)] for name in self._settings}

    def updated(self, state: RunState) -> RunState:
        """The state at the start of a step of the phase, with the references that are due frozen or renewed."""
        schedule = state.schedule
        cycle, entered = schedule.entries.get(self._phase, 0), schedule.last != self._phase
        steps = schedule.steps.get(self._phase, 0)
        due = {
            self._key(name): self._copy(self._source(reference, state))
            for name, reference in self._settings.items()
            if self._key(name) not in state.references or reference.is_due(cycle, entered, steps)
        }
        return replace(state, references={**state.references, **due}) if due else state

    def _source(self, reference: Reference, state: RunState) -> Params:
        policy = state.train.params["model"]
        if reference.path is None:
            return policy
        return read_like(reference.path, self._model, policy, state.base)

    def _frozen(self, trained: Params) -> Params:
        # It only computes, so it is kept in the dtype of the computation: its numbers are the same.
        return copied(self._model.cast(trained))

    def _key(self, name: str) -> str:
        return f"{self._phase}/{name}"


def copied(params: Params) -> Params:
    """A copy with buffers of its own: updates donate, and so delete, those of the policy."""
    return shard_params(jax.tree.map(jnp.copy, params), param_axes)


def read_like(path: str, model: LanguageModel, policy: Params, base: Params) -> Params:
    """The parameters of a Hugging Face folder, arranged like those of the policy.

    Raises:
        UserError: the policy trains adapters, or the model in the folder is of another shape.
    """
    decoder = decoder_beside(path, model, base)
    params = decoder.arranged(hf.load_pretrained(path)[1])
    check_alike(path, params, policy)
    return params


def decoder_beside(path: str, model: LanguageModel, base: Params) -> Decoder:
    """The policy's model, if a model out of a folder can stand beside it.

    Raises:
        UserError: it trains adapters, or is no decoder.
    """
    if base or not isinstance(model, Decoder):
        kind = "adapters" if base else type(model).__name__
        raise UserError(f"a model from {path} can stand beside a decoder that trains whole, got {kind}")
    return model


def check_alike(path: str, params: Params, policy: Params) -> None:
    """Raises `UserError` unless parameters out of a folder have the names and shapes of the policy's."""
    there, here = ({name: leaf.shape for name, leaf in flatten(tree).items()} for tree in (params, policy))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            shapes = f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} in the policy"
            raise UserError(f"{path} must hold a model of the policy's shape: {shapes}")
