"""python -m hybrid_jax.plan --config FILE --topology v5e:4x4 [--search] [a.b=value …]"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_jax.core.cli import ArgumentParser, run_command, set_up_logging
from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.devices import check_devices

if TYPE_CHECKING:
    from hybrid_jax.experiment import ExperimentConfig
    from hybrid_jax.planning.plan import Plan
    from hybrid_jax.planning.search import Settings, Trial
    from hybrid_jax.planning.topology import Topology
    from hybrid_jax.training.phase import Program

EXPLANATION = """\
Compiles every program of a step of every phase for devices that need not be there, and says what each needs. Of
a pretrained model only its config.json is read; data are not. Topologies: local, and slices of TPUs (extra tpu)
such as v5e:4x4, v6e:16x16, v4:2x2x4, v5p:4x4x4, tpu7x:2x2x1; 2xv5p:4x4x4 are two slices.

examples:
  python -m hybrid_jax.plan --config configs/quickstart.yaml --topology local
  python -m hybrid_jax.plan --config configs/tpu/llama31_8b.yaml --topology v5e:4x4 --price 1.2
  python -m hybrid_jax.plan --config configs/tpu/llama31_8b.yaml --topology v5e:4x4 --search

exit codes: 0 planned, whether it fits or not (the last line and the JSON's "fits" say), 2 a mistake in usage or
config (one line on stderr), 130 Ctrl-C
"""


def main(arguments: list[str]) -> None:
    """Runs the command on the arguments of a command line."""
    parser = ArgumentParser(
        prog="python -m hybrid_jax.plan",
        description="Says before a run whether it fits, and how fast it can be at best.",
        epilog=EXPLANATION,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, as for train")
    parser.add_argument(
        "--topology", default="local", metavar="NAME", help="devices to plan for (default local)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--price", type=_positive, metavar="X", help="dollars for a chip and an hour")
    parser.add_argument("--prompt-length", type=_count, metavar="P", help="tokens of the longest prompts")
    parser.add_argument("--search", action="store_true", help="try meshes, remat policies and microbatches")
    parser.add_argument(
        "--search-limit", type=_count, default=12, metavar="N", help="plans to try (default 12)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over those of the file")
    options = parser.parse_intermixed_args(arguments)
    set_up_logging()
    check_devices(expect_accelerator=False)

    from hybrid_jax.planning.plan import as_json
    from hybrid_jax.planning.search import render_search
    from hybrid_jax.planning.table import render
    from hybrid_jax.planning.topology import find_topology

    planner = _Planner(options, find_topology(options.topology))
    if not options.search:
        plan = planner.plan(options.overrides)
        print(json.dumps(as_json(plan)) if options.json else render(plan))
        return
    trials = planner.search(options.search_limit)
    if options.json:
        print(json.dumps({"trials": [_trial_json(trial) for trial in trials]}))
        return
    if trials and trials[0].plan is not None:
        print(render(trials[0].plan), end="\n\n")
    print(render_search(trials, options.search_limit))


class _Planner:
    """Makes plans of one config for one topology."""

    def __init__(self, options: Any, topology: Topology):
        self._options, self._topology = options, topology

    def plan(self, overrides: Sequence[str], stop_early: bool = False) -> Plan:
        """Compiles what the config with ``overrides`` runs, up to the first misfit if asked to."""
        from hybrid_jax.experiment import load_config, plan_phases
        from hybrid_jax.planning.plan import make_plan

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
        from hybrid_jax.experiment import load_config
        from hybrid_jax.planning.search import search

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
    """That one step needs by formula, as the run's log counts it; None where there is no formula."""
    from hybrid_jax.phases.policy_gradient import OnPolicy
    from hybrid_jax.phases.sft import SFT
    from hybrid_jax.phases.step_flops import sft_flops

    settings, model = config.phases[name], config.model.build(None)
    if isinstance(settings, SFT):
        return sft_flops(model, settings.batch_size, settings.length).get("flops")
    if isinstance(settings, OnPolicy):
        new = settings.sampler.max_new_tokens
        prompt = programs[1].tokens // settings.rows - new  # what is scored are whole rows
        needed = settings.flops(model, prompt, settings.rows * new)
        return float(needed["flops"]) if needed else None
    return None


def _changeable(config: ExperimentConfig) -> dict[str, str]:
    """The settings that a search may change, with their values."""
    from hybrid_jax.planning.search import REMAT

    found = {}
    if hasattr(config.model, "execution"):
        found[REMAT] = config.model.execution.remat
    for name, phase in config.phases.items():
        for setting in ("microbatches", "rollout_weights"):
            if hasattr(phase, setting):
                found[f"phases.{name}.{setting}"] = str(getattr(phase, setting))
    return found


def _trial_json(trial: Trial) -> dict[str, Any]:
    from hybrid_jax.planning.plan import as_json

    return {
        "overrides": trial.overrides,
        "fits": trial.problem is None,
        "problem": trial.problem,
        "tokens_per_second_at_most": trial.speed or None,
        "plan": None if trial.plan is None else as_json(trial.plan),
    }


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")


if __name__ == "__main__":
    run_command(main)
