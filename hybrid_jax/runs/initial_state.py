"""The state that a run starts from, as arrays or, for planning, as shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import LanguageModel, Params
from hybrid_jax.models.folders import hf
from hybrid_jax.models.lora import split
from hybrid_jax.models.param_axes import param_axes, path_of
from hybrid_jax.parallel.rules import Placement, made_in_parts, under
from hybrid_jax.training.phase import Phase
from hybrid_jax.training.state import RunState, TrainState

T = TypeVar("T")
Phases = Mapping[str, Phase]


def fresh_state(model: LanguageModel, phases: Phases, placement: Placement, key: jax.Array) -> RunState:
    """Makes the state before the first step, a function of its arguments; each device makes only its part."""
    return under(placement, _fresh)(model, phases, placement, key)


def _fresh(model: LanguageModel, phases: Phases, placement: Placement, key: jax.Array) -> RunState:
    trained, base = _split(model.init(key), phases)
    host: dict[str, Any] = {}
    train, references = made_in_parts(param_axes, partial(_begin, phases, host), trained, key)
    del trained
    train = _settled(placement, train)
    references, base = (_put(placement, tree) for tree in (references, model.cast(base)))
    return RunState(step=0, train=train, references=references, host=host, base=base)


def _split(params: Params, phases: Phases) -> tuple[Params, Params]:
    """Splits a model into what trains (adapters, all, or nothing beside heads) and what lies below."""
    if phases and not any(getattr(phase, "trains_trunk", True) for phase in phases.values()):
        return {}, params
    trained, base = split(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise UserError(
                f"model: its {path_of(path)} holds whole numbers, which no phase can train; a model of counts "
                "answers, is a reference and gives rewards"
            )
    return trained, base


def _begin(
    phases: Phases, host: dict[str, Any], trained: Params, key: jax.Array
) -> tuple[TrainState, dict[str, Params]]:
    """Makes what model and phases start with, on the devices; what they keep on the host goes into ``host``."""
    params = {"model": trained}
    opt_state: dict[str, dict[str, Any]] = {}
    extra: dict[str, Any] = {}
    references: dict[str, Params] = {}
    for phase in phases.values():
        added = phase.init(params, key)
        params |= added.params
        opt_state[phase.optimizer_key] = {**opt_state.get(phase.optimizer_key, {}), **added.opt_state}
        extra |= added.extra
        references |= added.references
        host |= added.host
    state: Any = TrainState  # pyright does not see the fields of a flax.struct.dataclass
    return state(params=params, opt_state=opt_state, extra=extra), references


def _settled(placement: Placement, train: T) -> T:
    """Arrays that an update may donate.

    On one device they were not compiled together: a constant that JAX shares between two leaves could not be
    donated twice. They are copied one by one, so that a model is never twice in memory.
    """
    if placement.mesh.size == 1:
        leaves, structure = jax.tree.flatten(train)
        del train
        for i in range(len(leaves)):
            leaves[i] = jnp.copy(leaves[i])
        train = jax.tree.unflatten(structure, leaves)
    return _put(placement, train)


def _put(placement: Placement, tree: T) -> T:
    """Moves a tree to where it lies, if it is not there already."""
    return jax.device_put(tree, placement.shardings(tree, param_axes))


def reference_shapes(model: LanguageModel, placement: Placement, trained: Params) -> Params:
    """Shapes of a reference, a frozen copy of what trains of a model."""
    return placement.shapes(jax.eval_shape(model.cast, trained), param_axes)


def state_shapes(model: LanguageModel, phases: Phases, placement: Placement) -> RunState:
    """The shapes of a state that has all its references: nothing is read, made or compiled."""
    return under(placement, _shapes)(model, phases, placement)


def _shapes(model: LanguageModel, phases: Phases, placement: Placement) -> RunState:
    trained, base = _split(hf.abstract_params(model), phases)
    host: dict[str, Any] = {}
    train, _ = jax.eval_shape(partial(_begin, phases, host), trained, jax.random.key(0))
    reference = reference_shapes(model, placement, trained)
    references = sorted({name for phase in phases.values() for name in phase.references})
    state = RunState(step=0, train=placement.shapes(train, param_axes), host=host)
    base = placement.shapes(jax.eval_shape(model.cast, base), param_axes)
    return replace(state, references=dict.fromkeys(references, reference), base=base)
