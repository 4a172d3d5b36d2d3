"""The report's building blocks: escaped text, sections, and charts that remember what they have shown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from hybrid_jax.reports.charts import Band, Panel, Series, draw, phase_class
from hybrid_jax.reports.glossary import GLOSSARY, PART_GLOSSARY
from hybrid_jax.reports.metrics import Chart, Line
from hybrid_jax.reports.run import Run

PHASE_NAMES = {"sft": "SFT", "ppo": "PPO"}
_MAX_TEXT = 2000


def escaped(value: object, limit: int = _MAX_TEXT) -> str:
    """Text as HTML, cut at ``limit`` characters, control characters shown as such."""
    text = str(value)
    text = text[:limit] + "…" if len(text) > limit else text
    return html.escape(
        "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    )


class Figures:
    """Draws charts and remembers their numbers for the hover, in the order of the page."""

    def __init__(self, run: Run):
        self._run = run
        self.hover: list[dict] = []
        self._drawn: set[str] = set()

    def chart(self, chart: Chart) -> str:
        band = self._band(chart.band)
        panels = []
        for names, floor in chart.panels:
            if lines := self._lines(names):
                panels.append(Panel(lines, floor, None if panels else band))
        if not panels:
            return ""
        drawing, hover = draw(panels, self._run.blocks, self._run.end)
        self.hover += hover
        title = f"<figcaption><h3>{escaped(chart.title, 100)}</h3></figcaption>"
        return f'<figure class="chart">{title}{drawing}{_note(chart.glossary)}</figure>'

    def has_drawn(self, chart: Chart) -> bool:
        return any(line.metric in self._drawn for lines, _ in chart.panels for line in lines)

    def count_as_drawn(self, metrics: Iterable[str]) -> None:
        """What the page shows in another way than as a chart."""
        self._drawn |= set(metrics)

    def rest(self, kind: str = "") -> list[Chart]:
        """A chart for each metric that no chart has shown, of those called ``<phase>/<kind>...``."""
        left = [metric for metric in self._run.curves if metric not in self._drawn]
        names = sorted({name for metric in left if (name := metric.partition("/")[2]).startswith(kind)})
        charts = []
        for name in names:
            lines = [Line(metric, _source_label(metric)) for metric in left if metric.partition("/")[2] == name]
            charts.append(
                Chart(words(name.removeprefix(kind)), [(lines, None)], name if kind else name.partition("/")[0])
            )
        return charts

    def _band(self, metrics: tuple[str, str] | None) -> Band | None:
        if metrics is None or not all(metric in self._run.curves for metric in metrics):
            return None
        self.count_as_drawn(metrics)
        low, high = (Series("", _colour(metric), *self._run.curves[metric]) for metric in metrics)
        return Band("10–90 %", low, high)

    def _lines(self, names: Sequence[Line]) -> list[Series]:
        found = [line for line in names if line.metric in self._run.curves]
        self._drawn |= {line.metric for line in found}
        return [
            Series(line.label, line.colour or _colour(line.metric), *self._run.curves[line.metric])
            for line in found
        ]


def _note(entry: str | None) -> str:
    found = GLOSSARY.get(entry or "") or PART_GLOSSARY.get(entry or "")
    return f'<p class="note">{escaped(" ".join(found))}</p>' if found else ""


def _colour(metric: str) -> str:
    phase = metric.partition("/")[0]
    return "eval" if phase == "evaluation" else phase_class(phase)


def _source_label(metric: str) -> str:
    phase = metric.partition("/")[0]
    return "held-out" if phase == "evaluation" else PHASE_NAMES.get(phase, phase)


def words(name: str) -> str:
    words = name.replace("reward/", "Reward: ").replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


def section(title: str, body: str, note: str = "") -> str:
    return f"<section><header><h2>{title}</h2>{note}</header>{body}</section>" if body else ""


def chart_grid(figures: Figures, charts: Sequence[Chart], css: str = "") -> str:
    drawn = "".join(figures.chart(chart) for chart in charts)
    return f'<div class="charts {css}">{drawn}</div>' if drawn else ""


def folded(title: str, body: str, css: str = "") -> str:
    """``title`` is HTML."""
    return f'<details class="{css}"><summary>{title}</summary>{body}</details>'
