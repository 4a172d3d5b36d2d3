"""A plan: every program of every phase on a topology, and what one step of each phase takes at best.

Bytes of memory are XLA's; FLOPs and bytes moved and sent are counted in XLA's optimised program. Seconds,
tokens a second, utilisation and prices follow from them by formula, from peaks that no run reaches: they are
bounds, and `as_json` keeps them apart under ``predicted_by_formula``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hybrid_jax.planning.program_cost import Cost
from hybrid_jax.planning.step import Roofline, Step, compile_step
from hybrid_jax.planning.topology import Topology
from hybrid_jax.training.phase import Program

SCHEMA = 1  # of the JSON; keys are only added under the same number


@dataclass(frozen=True)
class PhasePlan:
    """The programs of one step of a phase, and what the step does.

    Attributes:
        name: of the phase.
        steps: its programs, in the order in which a step runs them.
        tokens: those that a step learns from or samples, on all devices.
        model_flops: FLOPs that a step needs by formula, on all devices (`models.flops`); None without one.
    """

    name: str
    steps: tuple[Step, ...]
    tokens: int
    model_flops: float | None

    def seconds(self, topology: Topology) -> float | None:
        """The seconds of one step at best; None where a program or the chip's peaks are missing."""
        if topology.accelerator is None:
            return None
        each = [step.seconds(topology.accelerator) for step in self.steps]
        return None if None in each else sum(filter(None, each))

    def utilisation(self, topology: Topology) -> float | None:
        """The highest MFU that the roofline leaves room for."""
        seconds, chip = self.seconds(topology), topology.accelerator
        if not seconds or chip is None or self.model_flops is None:
            return None
        return self.model_flops / (seconds * topology.chips * chip.peak_flops)


@dataclass(frozen=True)
class Plan:
    """All phases of an experiment on a topology.

    Attributes:
        topology: the devices.
        mesh: how the config divides them, by axis.
        phases: in the order of the config.
        price: dollars for a chip and an hour, if given.
    """

    topology: Topology
    mesh: Mapping[str, int]
    phases: tuple[PhasePlan, ...]
    price: float | None = None

    @property
    def steps(self) -> list[Step]:
        """The programs of all phases, in order."""
        return [step for phase in self.phases for step in phase.steps]

    @property
    def fits(self) -> bool | None:
        """Tells whether every program fits into a device; None where the memory of the device is not known."""
        each = [step.fits(self.topology.accelerator) for step in self.steps]
        return False if False in each else None if None in each else True

    @property
    def fullest(self) -> Step:
        """The program that needs most memory; an unknown need counts as more than any other."""
        return max(self.steps, key=lambda step: float("inf") if step.peak is None else step.peak)

    def tokens_per_second(self) -> float | None:
        """Tokens a second over one step of each phase, one after the other: what a search ranks by."""
        each = [phase.seconds(self.topology) for phase in self.phases]
        if None in each or not sum(filter(None, each)):
            return None
        return sum(phase.tokens for phase in self.phases) / sum(filter(None, each))

    def dollars(self, tokens: int, seconds: float | None) -> float | None:
        """The price of a million tokens, for all chips of the topology; None without price or speed."""
        if self.price is None or not seconds or not tokens:
            return None
        return 1e6 / tokens * seconds / 3600 * self.topology.chips * self.price


def make_plan(
    topology: Topology,
    mesh: Mapping[str, int],
    programs: Mapping[str, Sequence[Program]],
    model_flops: Mapping[str, float | None],
    price: float | None = None,
    progress: Callable[[str], None] = lambda line: None,
    stop_early: bool = False,
) -> Plan:
    """Compiles every program of every phase; nothing is allocated or run.

    Args:
        topology: the devices that the programs' arguments lie on.
        mesh: how they are divided, to be shown.
        programs: of each phase, in the order of a step.
        model_flops: FLOPs that a step of each phase needs, for phases with a formula.
        price: dollars for a chip and an hour.
        progress: receives lines while programs are compiled.
        stop_early: ends at the first program that does not fit. Then the programs of a phase are compiled from
            the last to the first, since those that learn come last and need most memory.
    """
    phases: list[PhasePlan] = []
    plan = Plan(topology, mesh, (), price)
    for name, its_programs in programs.items():
        steps: list[Step] = []
        for program in reversed(its_programs) if stop_early else its_programs:
            step = compile_step(program, topology.platform)
            progress(f"compiled {program.name} in {step.compile_seconds:.1f} s")
            steps.append(step)
            if stop_early and step.fits(topology.accelerator) is False:
                break
        steps = steps[::-1] if stop_early else steps
        phases.append(PhasePlan(name, tuple(steps), its_programs[0].tokens, model_flops[name]))
        plan = replace(plan, phases=tuple(phases))
        if stop_early and plan.fits is False:
            break
    return plan


def versions() -> dict[str, str]:
    """The versions of the packages that a plan's numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("hybrid_jax", "jax", "jaxlib", "libtpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan as plain objects; bytes and FLOPs are those of one device."""
    chip = plan.topology.accelerator
    return {
        "schema": SCHEMA,
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "devices": len(plan.topology.devices),
        "slices": plan.topology.slices,
        "mesh": dict(plan.mesh),
        "accelerator": None if chip is None else asdict(chip),
        "price_per_chip_hour": plan.price,
        "fits": plan.fits,
        "fullest_program": plan.fullest.name,
        "phases": [_phase_json(plan, phase) for phase in plan.phases],
        "versions": versions(),
    }


def _phase_json(plan: Plan, phase: PhasePlan) -> dict[str, Any]:
    seconds = phase.seconds(plan.topology)
    return {
        "name": phase.name,
        "tokens": phase.tokens,
        "programs": [_step_json(plan, step) for step in phase.steps],
        "predicted_by_formula": {
            "model_flops": phase.model_flops,
            "seconds": seconds,
            "tokens_per_second": None if not seconds else phase.tokens / seconds,
            "utilisation_at_most": phase.utilisation(plan.topology),
            "dollars_per_million_tokens": plan.dollars(phase.tokens, seconds),
        },
    }


def _step_json(plan: Plan, step: Step) -> dict[str, Any]:
    chip = plan.topology.accelerator
    memory = step.memory
    counted = None if step.cost is None else [_part_json(plan, *part) for part in step.parts().items()]
    seconds = None if chip is None else step.seconds(chip)
    return {
        "name": step.name,
        "tokens": step.tokens,
        "compile_seconds": step.compile_seconds,
        "fits": step.fits(chip),
        "problem": step.problem,
        "memory": {
            "peak_bytes": step.peak,
            "beside_bytes": step.beside,
            "argument_bytes": None if memory is None else memory.arguments,
            "temporary_bytes": None if memory is None else memory.temporaries,
            "output_bytes": None if memory is None else memory.outputs,
            "alias_bytes": None if memory is None else memory.aliases,
            "live_bytes": None if memory is None else memory.live,
            "host_bytes": None if memory is None else memory.host,
        },
        "counted": None if step.cost is None else _cost_json(step.cost.total),
        "parts": counted,
        "predicted_by_formula": {
            "seconds": seconds,
            "tokens_per_second": None if not seconds else step.tokens / seconds,
            "dollars_per_million_tokens": plan.dollars(step.tokens, seconds),
        },
    }


def _part_json(plan: Plan, name: str, costs: tuple[Cost, int]) -> dict[str, Any]:
    cost, times = costs
    chip = plan.topology.accelerator
    roofline = None if chip is None else Roofline.of(cost, chip)
    predicted = {} if roofline is None else {**asdict(roofline), "bound_by": roofline.bound_by}
    return {
        "name": name or "all",
        "times": times,
        "counted": _cost_json(cost),
        "predicted_by_formula": {
            f"{key}_seconds" if key != "bound_by" else key: x for key, x in predicted.items()
        },
    }


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collective_bytes": dict(cost.collectives),
        "between_slices_bytes": cost.between_slices,
        "uncounted_calls": sorted(cost.uncounted),
    }
