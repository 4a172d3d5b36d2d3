"""Plans of one config for one topology: what `hybrid_jax.plan` prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import ExperimentConfig, load_config, plan_phases
from hybrid_jax.phases.imitation import Imitation
from hybrid_jax.phases.online_preference import OnlinePreference
from hybrid_jax.phases.policy_gradient import OnPolicy
from hybrid_jax.phases.sft import SFT
from hybrid_jax.phases.step_flops import sft_flops
from hybrid_jax.planning.plan import Plan, as_json, make_plan
from hybrid_jax.planning.search import REMAT, Settings, Trial, search
from hybrid_jax.planning.topology import Topology
from hybrid_jax.training.phase import Program


class Planner:
    """Makes plans of one config for one topology."""

    def __init__(self, options: Any, topology: Topology):
        self._options, self._topology = options, topology

    def plan(self, overrides: Sequence[str], stop_early: bool = False) -> Plan:
        """Compiles what the config with ``overrides`` runs, up to the first misfit if asked to."""
        config = _with_vocabulary(load_config(self._options.config, overrides))
        try:
            phases, state = plan_phases(config, self._topology.devices)
        except UserError as error:
            is_missing = repr(getattr(config.model, "path", None)) in str(error)
            raise UserError(f"{error}{_published_sizes(config) if is_missing else ''}") from error
        programs = {n: phase.programs(state, self._options.prompt_length) for n, phase in phases.items()}
        flops = {name: _model_flops(config, name, programs[name]) for name in phases}
        mesh = {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
        return make_plan(
            self._topology, mesh, programs, flops, self._options.price, progress=_say, stop_early=stop_early
        )

    def search(self, limit: int) -> list[Trial]:
        """Plans at most ``limit`` variants of the config, the fastest that fits first."""
        given = self._options.overrides
        current = _changeable(load_config(self._options.config, given))

        def attempt(settings: Settings) -> Plan:
            changed = [f"{name}={value}" for name, value in settings]
            return self.plan([*given, *changed], stop_early=True)

        return search(len(self._topology.devices), current, attempt, limit, progress=_say)


def _published_sizes(config: ExperimentConfig) -> str:
    """A hint at the folder of the checkout with a published model's config, where the hub cannot be reached."""
    path = getattr(config.model, "path", None)
    folder = Path(__file__).parents[1] / "configs" / "models" / Path(str(path)).name.lower()
    if path is None or Path(path).exists() or not folder.is_dir():
        return ""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    return f"; its sizes are enough for a plan: model.path={shown}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _with_vocabulary(config: ExperimentConfig) -> ExperimentConfig:
    """A model from scratch has its tokenizer's vocabulary: of one still to be trained, the planned size."""
    if getattr(config.model, "vocab_size", 0) is not None:
        return config
    planned = getattr(config.tokenizer, "vocab_size", None) or config.tokenizer.build(()).vocab_size
    return replace(config, model=replace(config.model, vocab_size=planned))


def _model_flops(config: ExperimentConfig, name: str, programs: Sequence[Program]) -> float | None:
    """The FLOPs that one step needs by formula, as the run's log counts it; None where there is no formula."""
    settings, model = config.phases[name], config.model.build(None)
    if isinstance(settings, SFT):
        return sft_flops(model, settings.batch_size, settings.length).get("flops")
    if isinstance(settings, OnPolicy | OnlinePreference | Imitation):
        new = settings.sampler.max_new_tokens
        scored = next(program for program in programs if program.name == f"{name}/score")
        prompt = scored.tokens // settings.rows - new  # what is scored are whole rows
        needed = settings.flops(model, prompt, settings.sampled_rows * new)
        return float(needed["flops"]) if needed else None
    return None


def _changeable(config: ExperimentConfig) -> dict[str, str]:
    """The settings that a search may change, with their values."""
    found = {}
    if hasattr(config.model, "execution"):
        found[REMAT] = config.model.execution.remat
    for name, phase in config.phases.items():
        for setting in ("microbatches", "rollout_weights"):
            if hasattr(phase, setting):
                found[f"phases.{name}.{setting}"] = str(getattr(phase, setting))
    return found


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as values that JSON can hold."""
    return {
        "overrides": trial.overrides,
        "fits": trial.problem is None,
        "problem": trial.problem,
        "tokens_per_second_at_most": trial.speed or None,
        "plan": None if trial.plan is None else as_json(trial.plan),
    }
