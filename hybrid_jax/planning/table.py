"""Renders a plan as text: a line for each program, what it sends, a line for each phase, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybrid_jax.parallel.mesh import split_over_slices
from hybrid_jax.planning.plan import PhasePlan, Plan, versions
from hybrid_jax.planning.program_cost import Cost
from hybrid_jax.planning.step import Roofline, Step

_HEADER = (
    *("program", "arguments", "temporary", "beside", "peak", "fits", "FLOPs", "moved", "sent"),
    *("at best", "bound by", "tokens/s", "compile"),
)
_LEGEND = """\
memory of one device: arguments and temporaries of the program, what lies beside it, and the sum less what is
donated, by XLA's memory analysis. FLOPs (matrix products), bytes moved to and from memory and sent to other
devices, of one device: counted in XLA's program, loops with all their turns. "At best", tokens/s (all chips),
MFU and price are predictions by formula from the {source} peaks: no run goes below."""


def render(plan: Plan) -> str:
    """Renders the whole plan."""
    lines = [*_heading(plan), "", *_aligned([_HEADER, *_rows(plan)]), "", *_sent(plan), ""]
    lines += [_total(plan, phase) for phase in plan.phases]
    chip = plan.topology.accelerator
    lines += ["", _LEGEND.format(source="unknown" if chip is None else chip.source)]
    lines += ["", ", ".join(f"{name} {number}" for name, number in versions().items()), "", verdict(plan)]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Says in one line whether the plan fits, and which program is closest to the limit."""
    chip, fullest = plan.topology.accelerator, plan.fullest
    needs = "more" if fullest.peak is None else size(fullest.peak)
    if chip is None:
        kind = plan.topology.devices[0].device_kind
        return f"unknown: {fullest.name} needs {needs} a device, of which {kind} has an unknown number"
    of_memory = f"{fullest.name} needs {needs} of {size(chip.memory_bytes)} a device"
    if plan.fits:
        return f"fits: {of_memory}"
    return f"does not fit: {of_memory}; try {_remedies(plan)}, or --search"


def _remedies(plan: Plan) -> str:
    """Names settings that make the programs smaller that do not fit."""
    failing = [
        step.name.rpartition("/") for step in plan.steps if step.fits(plan.topology.accelerator) is False
    ]
    settings = []
    for phase, _, function in failing:
        if function == "sample":
            settings += [f"phases.{phase}.rollout_weights=fsdp", f"a smaller phases.{phase}.prompts_per_step"]
        elif function == "score":
            settings += [f"a smaller phases.{phase}.prompts_per_step"]
        else:
            settings += [
                "a larger mesh.fsdp",
                "model.execution.remat=full",
                f"more phases.{phase}.microbatches",
            ]
    return ", ".join(dict.fromkeys(settings))


def _heading(plan: Plan) -> Iterator[str]:
    topology, chip = plan.topology, plan.topology.accelerator
    used = 1
    for count in plan.mesh.values():
        used *= count
    devices = f"{len(topology.devices)} devices of {topology.devices[0].device_kind}"
    memory = "" if chip is None else f", {size(chip.memory_bytes)} each"
    slices = "" if topology.slices == 1 else f" in {topology.slices} slices"
    yield f"{topology.name}: {devices}{slices}{memory}"
    mesh = " × ".join(f"{axis} {count}" for axis, count in plan.mesh.items())
    idle = (
        "" if used == len(topology.devices) else f": {len(topology.devices) - used} devices have nothing to do"
    )
    yield f"mesh: {mesh}{idle}"
    if topology.slices > 1:
        yield from _between_slices(plan)


def _between_slices(plan: Plan) -> Iterator[str]:
    """Says which mesh axes go over the network, and whether its speed is known."""
    chip, slices = plan.topology.accelerator, plan.topology.slices
    parts = split_over_slices(tuple(plan.mesh.values()), slices)
    spans = " × ".join(f"{axis} {n}" for axis, n in zip(plan.mesh, parts, strict=True) if n > 1)
    slow = "" if spans.startswith(f"data {slices}") else "; a mesh.data that the slices divide would send less"
    yield f"between slices: {spans}{slow}"
    if chip is not None and chip.network_bandwidth is None:
        yield f"{chip.name}: no speed between slices is published, what they exchange takes no time here"


def _rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    for step in plan.steps:
        yield from _step_rows(plan, step)


def _step_rows(plan: Plan, step: Step) -> Iterator[tuple[str, ...]]:
    chip = plan.topology.accelerator
    fits = {True: "yes", False: "NO", None: "?"}[step.fits(chip)]
    peak = "?" if step.peak is None else size(step.peak)
    if step.cost is None or step.memory is None:
        yield step.name, "", "", size(step.beside), peak, fits, *[""] * 6, _seconds(step.compile_seconds)
        return
    memory = (size(step.memory.arguments), size(step.memory.temporaries), size(step.beside), peak, fits)
    seconds = None if chip is None else step.seconds(chip)
    rate = "" if not seconds else f"{step.tokens / seconds:,.0f}"
    parts = step.parts()
    bound = "" if chip is None or len(parts) > 1 else Roofline.of(step.cost.total, chip).bound_by
    best = "" if seconds is None else _seconds(seconds)
    yield step.name, *memory, *_counted(step.cost.total), best, bound, rate, _seconds(step.compile_seconds)
    if len(parts) > 1:
        for name, (cost, times) in parts.items():
            yield _part_row(plan, f"  {name}" + (f" × {times}" if times > 1 else ""), cost)


def _part_row(plan: Plan, name: str, cost: Cost) -> tuple[str, ...]:
    chip = plan.topology.accelerator
    roofline = None if chip is None else Roofline.of(cost, chip)
    best = ("", "") if roofline is None else (_seconds(roofline.seconds), roofline.bound_by)
    return name, *[""] * 5, *_counted(cost), *best, "", ""


def _counted(cost: Cost) -> tuple[str, str, str]:
    flops = number(cost.flops) + (" + ?" if cost.uncounted else "")
    return flops, size(cost.bytes), size(cost.collective_bytes)


def _sent(plan: Plan) -> Iterator[str]:
    """Lists collectives by kind, and library calls that could not be counted."""
    for step in plan.steps:
        total = Cost() if step.cost is None else step.cost.total
        if total.collective_bytes:
            kinds = ", ".join(f"{kind} {size(sent)}" for kind, sent in total.collectives.items() if sent)
            yield f"{step.name} sends {kinds}"
        if total.between_slices:
            yield f"{step.name} sends {size(total.between_slices)} to other slices"
        if total.uncounted:
            yield f"{step.name} calls {', '.join(sorted(total.uncounted))}, whose FLOPs are not counted"
        if step.problem:
            yield f"{step.name}: {step.problem}"


def _total(plan: Plan, phase: PhasePlan) -> str:
    seconds = phase.seconds(plan.topology)
    if not seconds:
        return f"{phase.name}: no prediction"
    verb = "sampled" if len(phase.steps) > 1 else "learnt from"
    parts = [
        f"{phase.name}: a step takes at least {_seconds(seconds)}",
        f"at most {phase.tokens / seconds:,.0f} tokens/s {verb}",
    ]
    if (utilisation := phase.utilisation(plan.topology)) is not None:
        parts.append(f"MFU at most {100 * utilisation:.0f} %")
    if (dollars := plan.dollars(phase.tokens, seconds)) is not None:
        parts.append(f"at least ${dollars:.3g} a million tokens")
    return ", ".join(parts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def size(count: float) -> str:
    """Writes bytes with a binary unit: 3.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{_three(count)} {unit}"
        count /= 1024
    return f"{_three(count)} TiB"


def number(count: float) -> str:
    """A number with a decimal unit: 3.50 T."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{_three(count)} {unit}".rstrip()
        count /= 1000
    return f"{_three(count)} P"


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def _three(count: float) -> str:
    """Three digits."""
    return f"{count:.0f}" if abs(count) >= 100 else f"{count:.1f}" if abs(count) >= 10 else f"{count:.2f}"
