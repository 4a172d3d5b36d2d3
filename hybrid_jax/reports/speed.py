"""Draws the report's figures of speed and memory: where the time of a step and of the run went, and a table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from hybrid_jax.reports.charts import HELD_OUT, OTHER, SECOND, short_number
from hybrid_jax.reports.run import Run

Record = Mapping[str, Any]

# The parts of a step in their order in time, with the colour of each.
PARTS = {"input": OTHER, "rollout": "orange", "reward": SECOND, "score": "green", "update": "blue"}
_BESIDE = {"evaluation": HELD_OUT, "checkpoint": SECOND}


@dataclass(frozen=True)
class Share:
    """One piece of a bar."""

    label: str
    colour: str
    seconds: float


def speed_figures(run: Run) -> str:
    """Bars and table as HTML; nothing for a run that logged no times."""
    records, phases = run.records, [phase for phase in run.kinds if f"{phase}/seconds" in run.curves]
    if not phases:
        return ""
    bars = [_bar("The whole run", _of_run(run, phases))]
    for phase in phases:
        if shares := _of_step(_without_first(records, phase), phase):
            bars.append(_bar(f"A step of {run.label(phase)}, on average", shares))
    rows = [_row(records, phase, run.label(phase)) for phase in phases]
    return f'<div class="splits">{"".join(bars)}</div>{_table(rows)}{_machine(records)}'


def _of_run(run: Run, phases: Sequence[str]) -> list[Share]:
    def seconds(metric: str) -> float:
        return sum(_numbers(run.records, metric))

    shares = [
        Share(f"{run.label(phase)} steps", run.colour(phase), seconds(f"{phase}/seconds")) for phase in phases
    ]
    shares += [Share(name, colour, seconds(f"time/{name}_seconds")) for name, colour in _BESIDE.items()]
    return [share for share in shares if share.seconds > 0]


def _of_step(records: Sequence[Record], phase: str) -> list[Share]:
    """The mean seconds of each part of a step."""
    found = {part: _numbers(records, f"{phase}/{part}_seconds") for part in PARTS}
    if not found["update"]:
        return []
    return [Share(part, PARTS[part], fmean(seconds)) for part, seconds in found.items() if seconds]


def _without_first(records: Sequence[Record], phase: str) -> list[Record]:
    """The steps of a phase without its first, which compiles, unless it is the only one."""
    steps = [record for record in records if record["phase"] == phase]
    return steps[1:] or steps


def _bar(title: str, shares: Sequence[Share]) -> str:
    total = sum(share.seconds for share in shares)
    pieces = "".join(
        f'<i class="{share.colour}" style="width:{100 * share.seconds / total:.2f}%"></i>' for share in shares
    )
    keys = "".join(
        f'<span class="key {share.colour}"><i></i>{html.escape(share.label)} <b>{_seconds(share.seconds)}</b> '
        f"{100 * share.seconds / total:.0f} %</span>"
        for share in shares
    )
    heading = f"<h3>{html.escape(title)}: {_seconds(total)}</h3>"
    bar = f'<div class="bar">{pieces}</div><div class="legend">{keys}</div>'
    return f'<figure class="split">{heading}{bar}</figure>'


def _row(records: Sequence[Record], phase: str, name: str) -> list[str]:
    steps = _without_first(records, phase)

    def middle(metric: str) -> float | None:
        numbers = _numbers(steps, f"{phase}/{metric}")
        return median(numbers) if numbers else None

    seconds, tokens, mfu = middle("seconds"), middle("tokens_per_second"), middle("mfu")
    return [
        name,
        f"{sum(record['phase'] == phase for record in records):,}",
        "–" if seconds is None else _seconds(seconds),
        short_number(tokens),
        "–" if mfu is None else f"{100 * mfu:.1f} %",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "steps logged", "a step", "tokens a second", "MFU"))
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    note = '<p class="note">Medians, the first step of a phase left out: it compiles.</p>'
    return f'<table class="speed"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}'


def _machine(records: Sequence[Record]) -> str:
    """Lists memory and compilation, which a resumed run counts again from its own start."""
    rows = []
    for metric, label in {
        "memory/peak_bytes": "Peak memory of a device",
        "memory/host_peak_bytes": "Peak memory of the process (host)",
    }.items():
        if numbers := _numbers(records, metric):
            rows.append((label, f"{max(numbers) / 2**30:.2f} GiB"))
    if counts := _numbers(records, "compile/count"):
        seconds = _numbers(records, "compile/seconds")
        rows.append(("Programs compiled", f"{max(counts):.0f}, in {_seconds(max(seconds, default=0.0))}"))
    cells = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in rows)
    return f'<dl class="rows">{cells}</dl>' if rows else ""


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{short_number(value)} s"


def _numbers(records: Sequence[Record], metric: str) -> list[float]:
    return [number for record in records if (number := _number(record, metric)) is not None]


def _number(record: Record, metric: str) -> float | None:
    value = record.get(metric)
    return float(value) if isinstance(value, int | float) else None
