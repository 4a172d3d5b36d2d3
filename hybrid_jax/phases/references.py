"""References: frozen models that hold a trained one back, copies of it or models out of folders.

The copies of a phase are its own state: ``RunState.references`` keeps them as ``<phase>/<reference>``. So two
phases that freeze at different times keep different ones. A model out of a folder never changes: each start of
a run reads it again, and no checkpoint holds it. It may be of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.keys import Purpose, root_key
from hybrid_jax.core.ranges import Count, NonNegative, settings
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.decoder_config import ComputeDtype
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.families.family import flatten
from hybrid_jax.models.folders import hf
from hybrid_jax.models.folders.files import read_model_config
from hybrid_jax.models.folders.hub import find_folder
from hybrid_jax.models.folders.ours import MODEL_TYPE, model_of_ours
from hybrid_jax.models.folders.pretrained import load_pretrained
from hybrid_jax.models.folders.recurrent import LoadedRecurrent, is_recurrent
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
    path: str | None = None  # another model in place of a copy: a folder of one with the same tokens

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
        # Before the first step there is nothing to renew: it is frozen then, or was at the start.
        cycles, every = self.refresh_every_cycles, self.refresh_every_steps
        by_cycle = cycles is not None and entered and cycle > 0 and cycle % cycles == 0
        return by_cycle or (every is not None and steps > 0 and steps % every == 0)


def shares_of(references: Mapping[str, Reference]) -> dict[str, float]:
    """The weight of each reference, together 1."""
    total = sum(reference.weight for reference in references.values())
    return {name: reference.weight / total for name, reference in references.items()}


class References:
    """The references of one phase: when they are frozen, and where the state of the run keeps them.

    Args:
        settings: of each, by name.
        phase: the name of the phase.
        model: of the policy.
        placement: of the parameters.
    """

    def __init__(
        self,
        settings: Mapping[str, Reference],
        phase: str,
        model: LanguageModel,
        placement: Placement,
    ):
        self._settings, self._phase, self._model, self._placement = settings, phase, model, placement
        self._copies = [name for name, reference in settings.items() if reference.path is None]
        self._others = {n: m for n, m in reference_models(settings, model).items() if n not in self._copies}
        self._read: dict[str, Params] = {}
        self._copy = jax.jit(under(placement, self._frozen))

    def on(self, placement: Placement) -> References:
        """The same references on other devices."""
        return References(self._settings, self._phase, self._model, placement)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the copies in `RunState.references`."""
        return tuple(map(self._key, self._copies))

    def init(self, policy: Params) -> dict[str, Params]:
        """Those that a fresh run freezes at its start."""
        at_start = (name for name in self._copies if self._settings[name].frozen_at == "start")
        return {self._key(name): self._frozen(policy) for name in at_start}

    def of(self, state: RunState) -> dict[str, Params]:
        """All of them, by the names in the settings."""
        return {**self._copies_in(state), **{name: self._folder(name) for name in self._others}}

    def shapes(self, state: RunState) -> dict[str, Params]:
        """The shapes of all of them, for a state of shapes: no folder is read."""
        others = {
            name: self._placement.shapes(jax.eval_shape(model.cast, hf.abstract_params(model)), param_axes)
            for name, model in self._others.items()
        }
        return {**self._copies_in(state), **others}

    def updated(self, state: RunState) -> RunState:
        """The state at the start of a step of the phase, with the references that are due frozen or renewed."""
        schedule = state.schedule
        cycle, entered = schedule.entries.get(self._phase, 0), schedule.last != self._phase
        steps = schedule.steps.get(self._phase, 0)
        due = {
            self._key(name): self._copy(state.train.params["model"])
            for name in self._copies
            if self._key(name) not in state.references or self._settings[name].is_due(cycle, entered, steps)
        }
        return replace(state, references={**state.references, **due}) if due else state

    def _copies_in(self, state: RunState) -> dict[str, Params]:
        return {name: state.references[self._key(name)] for name in self._copies}

    def _folder(self, name: str) -> Params:
        """The parameters out of a folder, read once."""
        if name not in self._read:
            model, path = self._others[name], self._settings[name].path
            assert path is not None
            if isinstance(
                model, hf.PretrainedDecoder | LoadedRecurrent
            ):  # whose `init` reads, and draws nothing
                params = under(self._placement, model.init)(root_key(0, Purpose.MODEL))
            else:
                params = load_pretrained(path)[1]
            cast = under(self._placement, lambda x: shard_params(model.cast(x), param_axes))
            self._read[name] = jax.jit(cast)(params)
        return self._read[name]

    def _frozen(self, trained: Params) -> Params:
        # It only computes, so it is kept in the dtype of the computation: its numbers are the same.
        return copied(self._model.cast(trained))

    def _key(self, name: str) -> str:
        return f"{self._phase}/{name}"


def reference_model(reference: Reference, policy: LanguageModel) -> LanguageModel:
    """The model that reads the parameters of a reference: the policy's, or that of its folder.

    Raises:
        UserError: the folder holds no language model, or one with fewer tokens.
    """
    if reference.path is None:
        return policy
    config = policy.config if isinstance(policy, Decoder) else DecoderConfig()
    model = _model_in(reference.path, config.dtype, config.execution)
    if model.vocab_size < policy.vocab_size:
        raise UserError(
            f"{reference.path} must hold a model of the policy's {policy.vocab_size} tokens or more, got "
            f"{model.vocab_size}"
        )
    return model


def reference_models(settings: Mapping[str, Reference], policy: LanguageModel) -> dict[str, LanguageModel]:
    """The model of each reference, by name."""
    return {name: reference_model(reference, policy) for name, reference in settings.items()}


@functools.cache
def _model_in(path: str, dtype: ComputeDtype, execution: Execution) -> LanguageModel:
    folder = find_folder(path)
    if read_model_config(folder).get("model_type") == MODEL_TYPE:
        model = model_of_ours(folder)
        if not isinstance(model, LanguageModel):
            raise UserError(f"{path} holds a {type(model).__name__}, which gives no answers")
        return model
    if is_recurrent(folder):
        return hf.Pretrained(path).build()
    return hf.Pretrained(path, dtype, execution=execution).build()


def shortest_context(references: Mapping[str, Reference], policy: LanguageModel) -> int | None:
    """Tokens that the policy and all references can read; None: any number."""
    models = [policy, *reference_models(references, policy).values()]
    return min((m.max_length for m in models if m.max_length is not None), default=None)


def copied(params: Params) -> Params:
    """A copy with buffers of its own: updates donate, and so delete, those of the policy."""
    return shard_params(jax.tree.map(jnp.copy, params), param_axes)


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
