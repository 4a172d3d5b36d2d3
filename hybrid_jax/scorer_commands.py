"""What the commands do with a run that trains a scorer of texts, in place of a policy."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.registry import NOTHING
from hybrid_jax.experiment import Experiment, build, load_run_config
from hybrid_jax.runs.policy import run_settings, trust_explained
from hybrid_jax.training.checkpoint import Checkpoints
from hybrid_jax.training.phase import PHASES
from hybrid_jax.training.state import RunState


def trains_scorer(run_dir: str | Path, trust: Container[str] = NOTHING) -> bool:
    """Whether a run trains a classifier or a reward model, and so no policy.

    Raises:
        Untrusted: a phase's name runs code and is not in ``trust``.
    """
    phases = run_settings(run_dir).get("phases") or {}
    with trust_explained(run_dir):
        kinds = [PHASES.find(phase.get("name", name), trust) for name, phase in phases.items()]
    return any(getattr(kind, "trains_scorer", False) for kind in kinds)


def export_scorer(run_dir: str | Path, folder: str | Path, trust: Container[str] = NOTHING) -> Path:
    """Writes the newest scorer of a run; returns the folder.

    Raises:
        UserError: the run has no checkpoint, its data is gone, or the folder cannot be written.
    """
    experiment, state = _newest_scorer(run_dir, trust)
    return experiment.export(state, Path(folder))


def evaluate_scorer(run_dir: str | Path, trust: Container[str] = NOTHING) -> tuple[int, dict[str, float]]:
    """Step and held-out numbers of the newest scorer of a run."""
    experiment, state = _newest_scorer(run_dir, trust)
    return state.step, {
        name.removeprefix("evaluation/"): v for name, v in experiment.evaluate(state)[0].items()
    }


def _newest_scorer(run_dir: str | Path, trust: Container[str]) -> tuple[Experiment, RunState]:
    experiment = build(load_run_config(run_dir, trust=trust))
    state = Checkpoints(experiment.files.checkpoints, keep=1).newest(experiment.init())
    if state is None:
        raise UserError(f"{run_dir} holds no checkpoint yet: train it up to its first checkpoint")
    return experiment, state
