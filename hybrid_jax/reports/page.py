"""The report's building blocks: escaped text, sections, and charts that remember what they have shown."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from hybrid_jax.reports.charts import Band, Panel, Series, draw
from hybrid_jax.reports.glossary import GLOSSARY, PART_GLOSSARY
from hybrid_jax.reports.metrics import Chart, Line
from hybrid_jax.reports.run import Run
from hybrid_jax.training.time_left import EVALUATION

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
        """A chart as HTML; nothing where the run has none of its numbers."""
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
        return f'<figure class="chart">{title}{drawing}{glossary_note(chart.glossary)}</figure>'

    def has_drawn(self, chart: Chart) -> bool:
        """Tells whether the page shows a line of the chart already."""
        return any(line.metric in self._drawn for lines, _ in chart.panels for line in lines)

    def can_draw(self, chart: Chart) -> bool:
        """Tells whether the run has any of a chart's numbers."""
        return any(line.metric in self._run.curves for lines, _ in chart.panels for line in lines)

    def count_as_drawn(self, metrics: Iterable[str]) -> None:
        """Notes metrics that the page shows in another way than as a chart."""
        self._drawn |= set(metrics)

    def rest(self, start: str = "", of: Collection[str] | None = None) -> list[Chart]:
        """A chart for each metric that no chart has shown.

        Args:
            start: how its name begins, after the phase; left out in the title.
            of: the phases whose metrics to look at, "" for held-out ones of no phase; None for all.
        """
        by_name: dict[str, list[Line]] = {}
        for metric in self._run.curves:
            source, (phase, name) = metric.partition("/")[0], self._run.named(metric)
            if metric not in self._drawn and name.startswith(start) and (of is None or phase in of):
                label = "held-out" if source == EVALUATION else self._run.label(phase)
                by_name.setdefault(name, []).append(Line(metric, label))
        return [
            Chart(words(name.removeprefix(start)), [(lines, None)], name if start else name.partition("/")[0])
            for name, lines in sorted(by_name.items())
        ]

    def _band(self, metrics: tuple[str, str] | None) -> Band | None:
        if metrics is None or not all(metric in self._run.curves for metric in metrics):
            return None
        self.count_as_drawn(metrics)
        low, high = (Series("", self._run.colour(metric), *self._run.curves[metric]) for metric in metrics)
        return Band("10–90 %", low, high)

    def _lines(self, names: Sequence[Line]) -> list[Series]:
        found = [line for line in names if line.metric in self._run.curves]
        self._drawn |= {line.metric for line in found}
        return [
            Series(line.label, line.colour or self._run.colour(line.metric), *self._run.curves[line.metric])
            for line in found
        ]


def glossary_note(entry: str | None) -> str:
    """An entry of the glossary as the note beneath a chart."""
    found = GLOSSARY.get(entry or "") or PART_GLOSSARY.get(entry or "")
    return f'<p class="note">{escaped(" ".join(found))}</p>' if found else ""


def words(name: str) -> str:
    """The name of a metric as a title."""
    words = name.replace("reward/", "Reward: ").replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


def section(title: str, body: str, note: str = "") -> str:
    """A section of the page, ``title`` and ``note`` in its header; nothing without a body."""
    return f"<section><header><h2>{title}</h2>{note}</header>{body}</section>" if body else ""


def chart_grid(figures: Figures, charts: Iterable[Chart], css: str = "") -> str:
    """Draws the charts that the run has numbers for, side by side."""
    drawn = "".join(figures.chart(chart) for chart in charts)
    return f'<div class="charts {css}">{drawn}</div>' if drawn else ""


def folded(title: str, body: str, css: str = "") -> str:
    """A body that opens at a click on its title, which is HTML."""
    return f'<details class="{css}"><summary>{title}</summary>{body}</details>'
