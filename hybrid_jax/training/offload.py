"""Moves what no phase uses at the moment to the host's memory.

Phases alternate, and while one takes its steps the optimizer state of the others and, in supervised phases, the
references are idle. On TPU and GPU they can wait in pinned host memory; they are moved when the phase changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import jax

from hybrid_jax.training.phase import Phase
from hybrid_jax.training.state import RunState

T = TypeVar("T")
Idle = Literal["optimizer_states", "references"]
DEVICE, HOST = "device", "pinned_host"


def placed_for(state: RunState, phase: Phase, offload: Sequence[Idle]) -> RunState:
    """Moves all that ``phase`` uses to the devices, and of the rest what ``offload`` names to the host."""
    if not offload:
        return state
    opt_state, references = dict(state.train.opt_state), dict(state.references)
    if "optimizer_states" in offload:
        opt_state = {n: _moved(tree, n == phase.optimizer_key) for n, tree in opt_state.items()}
    if "references" in offload:
        references = {n: _moved(tree, n in phase.references) for n, tree in references.items()}
    return replace(state, train=replace(state.train, opt_state=opt_state), references=references)


def without_idle(state: RunState, phase: Phase) -> tuple[RunState, dict[str, Any]]:
    """Splits off the optimizer states that ``phase`` does not use: its updates donate only its own."""
    key = phase.optimizer_key
    idle = {name: tree for name, tree in state.train.opt_state.items() if name != key}
    own = {name: tree for name, tree in state.train.opt_state.items() if name == key}
    return replace(state, train=replace(state.train, opt_state=own)), idle


def with_idle(state: RunState, idle: dict[str, Any]) -> RunState:
    """Puts back the optimizer states that `without_idle` took out."""
    return replace(state, train=replace(state.train, opt_state={**state.train.opt_state, **idle}))


def _moved(tree: T, to_device: bool) -> T:
    kind = DEVICE if to_device else HOST
    leaves = jax.tree.leaves(tree)
    if all(leaf.sharding.memory_kind == kind for leaf in leaves):
        return tree
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))
