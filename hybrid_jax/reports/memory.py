"""Shows what the state of a recurrent model keeps, over training, and where the heads of a memory are."""

from __future__ import annotations

import html
from collections.abc import Sequence

from hybrid_jax.reports.charts import Panel, Series, draw_over, short_number
from hybrid_jax.reports.metrics import Chart, Line, many_colour
from hybrid_jax.reports.page import Figures, chart_grid, glossary_note, section
from hybrid_jax.reports.run import Run

_PREFIX = "evaluation/memory/"


def memory_section(run: Run, figures: Figures) -> str:
    """Charts of gradients, recall and gates, and the heads of a memory at the first and last evaluation."""
    lags = sorted(int(name) for name in run.names(f"{_PREFIX}gradient_"))
    gradient = [("gradient", 0, "at first"), ("gradient", -1, "at last")]
    recall = [
        ("recall", 0, "at first"),
        ("recall", -1, "at last"),
        ("last_token", -1, "from the last token alone"),
    ]
    over = _over_distance(run, "Gradient of the last loss, by distance in tokens", lags, gradient, log=True)
    over += _over_distance(run, "Recall, by distance in tokens", lags, recall)
    layers = sorted({name.partition("/")[0] for name in run.names(_PREFIX) if "/" in name})
    charts = [_gates(run, layer) for layer in layers]
    drawn = f'<div class="charts wide">{over}</div>' if over else ""
    drawn += chart_grid(figures, charts, "wide") + _by_distance(run, lags) + "".join(_heads(run))
    figures.count_as_drawn(name for name in run.curves if name.startswith(_PREFIX))
    return section("What the state keeps", drawn)


def _over_distance(
    run: Run, title: str, lags: Sequence[int], curves: Sequence[tuple[str, int, str]], log: bool = False
) -> str:
    """A chart of numbers over the distance: of each curve the metric, which evaluation, and its label."""
    lines = []
    for i, (name, end, label) in enumerate(curves):
        ends = [(run.points(f"{_PREFIX}{name}_{lag}") or [(0, None)])[end][1] for lag in lags]
        ys = [None if y is None or (log and y <= 0) else y for y in ends]
        if any(y is not None for y in ys):
            lines.append(Series(label, many_colour(i), range(len(lags)), ys))
    if not lines:
        return ""
    drawn = draw_over([str(lag) for lag in lags], "tokens before", Panel(lines, None if log else 0.0), log)
    note = glossary_note(f"memory/{curves[0][0]}")
    return f'<figure class="chart"><figcaption><h3>{title}</h3></figcaption>{drawn}{note}</figure>'


def _gates(run: Run, layer: str) -> Chart:
    gates = run.names(f"{_PREFIX}{layer}/")
    lines = [Line(f"{_PREFIX}{layer}/{gate}", gate, many_colour(i)) for i, gate in enumerate(gates)]
    return Chart(f"Gates of {layer.replace('_', ' ')}", [(lines, 0.0)], "memory/gates")


def _by_distance(run: Run, lags: Sequence[int]) -> str:
    """A table of both over the distance, at the first and at the last evaluation."""
    if not lags:
        return ""

    def ends(name: str) -> list[str]:
        points = run.points(f"{_PREFIX}{name}") or [(0, None)]
        return [short_number(points[0][1]), short_number(points[-1][1])]

    names = ("tokens before", "gradient at first", "gradient at last", "recall at first", "recall at last")
    names += ("from the last token alone", "always the commonest")
    head = "".join(f"<th>{name}</th>" for name in names)
    baselines = ("last_token", "chance")
    rows = [
        [
            str(lag),
            *ends(f"gradient_{lag}"),
            *ends(f"recall_{lag}"),
            *(ends(f"{x}_{lag}")[1] for x in baselines),
        ]
        for lag in lags
    ]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<table class="speed"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide-table">{table}</div>'


def _heads(run: Run) -> list[str]:
    """A heat map for each head, at the first and at the last evaluation."""
    maps = []
    for record in dict.fromkeys((0, len(run.memories) - 1)) if run.memories else ():
        step, shown = run.memories[record]["step"], run.memories[record]["memory"]
        for layer, kinds in enumerate(shown["layers"]):
            for kind in ("write", "read"):
                for number, weights in enumerate(heads := kinds[kind]):
                    which = f" {number + 1}" if len(heads) > 1 else ""
                    of_layer = f" of layer {layer}" if len(shown["layers"]) > 1 else ""
                    title = f"{kind.capitalize()} head{which}{of_layer} · step {step:,}"
                    maps.append(_heat_map(title, weights, shown["read"], kind))
    return [f'<div class="charts wide heads">{"".join(maps)}</div>'] if maps else []


def _heat_map(title: str, weights: Sequence[Sequence[int]], read: Sequence[str], kind: str) -> str:
    """Slots downwards, tokens to the right; a field is as dark as its weight, in per cent, by the largest."""
    largest = max((weight for row in weights for weight in row), default=0)
    fields = "".join(
        f'<rect x="{token}" y="{slot}" width="1" height="1" opacity="{weight / largest:.2f}"/>'
        for slot, row in enumerate(weights)
        for token, weight in enumerate(row)
        if weight
    )
    colour = "orange" if kind == "write" else "blue"
    box = f'viewBox="0 0 {len(read)} {len(weights)}" preserveAspectRatio="none" aria-hidden="true"'
    tokens = "".join(f"<span>{_shown(token)}</span>" for token in read)
    return (
        f'<figure class="chart"><figcaption><h3>{html.escape(title)} · darkest {largest} %</h3></figcaption>'
        f'<div class="frame"><div class="ys"><span style="top:0">0</span>'
        f'<span style="bottom:0">{len(weights) - 1}</span></div>'
        f'<div class="slots"><svg class="{colour}" {box}>{fields}</svg></div></div>'
        f'<div class="frame"><div class="ys"></div><div class="read">{tokens}</div></div></figure>'
    )


def _shown(token: str) -> str:
    """A token in a narrow column: what cannot be seen by a sign for it."""
    seen = token.replace(" ", "␣").replace("\n", "⏎")
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in seen[:12])) or "∅"
