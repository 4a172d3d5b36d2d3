"""Folders of the heads that a run has trained, which a reward reads by ``path``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid_jax.core.config import local_path
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.tokenizer import Tokenizer
from hybrid_jax.models.folders.ours import check_has_format
from hybrid_jax.models.folders.scorer import save_scorer
from hybrid_jax.models.heads import HEADS as REGISTRY
from hybrid_jax.parallel import hosts
from hybrid_jax.phases.heads import HeadPhase
from hybrid_jax.runs.export_folder import HEADS, claim_export_folder
from hybrid_jax.training.state import RunState


def check_heads(heads: Mapping[str, Any], settings: Mapping[str, Any], phases: Mapping[str, Any]) -> None:
    """Checks that a phase trains each head, and that a folder can hold it: the end of a run writes it.

    Args:
        heads: settings, by name.
        settings: of all phases, also of those that take no steps.
        phases: those that do.

    Raises:
        UserError: one of them is not so.
    """
    named = {phase.head for phase in settings.values() if hasattr(phase, "head")}
    named |= {name for phase in phases.values() for name in getattr(phase, "heads", ())}
    for name, head in heads.items():
        if name not in named and None not in named:  # None takes the only one
            raise UserError(f"heads.{name} is trained by no phase: say head: {name} in one, or leave it out")
        check_has_format(head, REGISTRY)


def save_heads(
    phases: Iterable[Any],
    state: RunState,
    folder: str | Path,
    tokenizer: Tokenizer,
    component: Any,
    *,
    beside: bool,
) -> dict[str, Path]:
    """Writes trunk and head of every head that phases train, with the tokenizer; returns the folder of each.

    Args:
        phases: of the run.
        state: of the run.
        folder: a new or an empty one, or an earlier export. It holds the head itself where that is all there is
            to write, else ``heads/<name>``.
        tokenizer: of the run.
        component: the settings of the trunk.
        beside: whether a language model is written, too.

    Raises:
        UserError: the folder holds something that we did not export, or cannot be written.
    """
    training: dict[str, list[HeadPhase]] = {}
    for phase in phases:
        if isinstance(phase, HeadPhase):
            training.setdefault(phase.head, []).append(phase)
    alone, whole = len(training) == 1 and not beside, local_path(folder, "the folder to export to")
    if training and not beside and hosts.is_first():
        claim_export_folder(whole, state.step)
    written = {}
    for name, trained_by in training.items():
        target = whole / ("" if alone else f"{HEADS}/{name}")
        extra = {key: value for phase in trained_by for key, value in phase.extra(state).items()}
        if hosts.is_first():
            claim_export_folder(target, state.step)
            tokenizer.save(target)
        phase, extra = trained_by[0], {**extra, "step": state.step}
        save_scorer(target, phase.scorer, phase.params_of(state), extra=extra, component=component)
        written[name] = target
    return written
