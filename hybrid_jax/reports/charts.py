"""Draws the report's charts as static SVG that stretches to any width, and lists the numbers for the hover.

The SVG holds only lines and areas in a 1000 × 100 box that the browser stretches (strokes keep their width);
all text is HTML, placed in per cent, so it keeps its size on a phone and on paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

Numbers = Sequence[float | None]  # None is a gap: a NaN or an infinity
MAX_POINTS = 600
_WIDTH, _HEIGHT = 1000, 100
_FEW = 40  # a curve with fewer points shows each of them
# Classes of the style sheet: of phases in the order in which they begin, of held-out numbers, of all else.
_PHASES = ("blue", "orange", "pink", "brown")
HELD_OUT, OTHER, SECOND = "green", "olive", "purple"  # the second curve of a chart that is of no other phase
_MIN_BAND = 0.02  # of the chart's width: a narrower phase block is only part of the strip


@dataclass(frozen=True)
class Series:
    """One curve: ``colour`` is a class of the style sheet, ``xs`` are steps."""

    label: str
    colour: str
    xs: Sequence[int]
    ys: Numbers


@dataclass(frozen=True)
class Band:
    """The area between two curves."""

    label: str
    low: Series
    high: Series


@dataclass(frozen=True)
class Panel:
    """Curves that share a vertical axis; ``floor`` is a value that the axis must reach down to."""

    series: Sequence[Series]
    floor: float | None = None
    band: Band | None = None

    @property
    def all_series(self) -> list[Series]:
        """All curves; those of the band come last."""
        return [*self.series, *((self.band.low, self.band.high) if self.band else ())]


@dataclass(frozen=True)
class Block:
    """Consecutive steps [start, end), the share of each phase by colour: ``{"blue": 0.4, "orange": 0.6}``."""

    start: int
    end: float
    shares: dict[str, float]


def thin(xs: Sequence[int], ys: Numbers, limit: int = MAX_POINTS) -> tuple[list[int], list[float | None]]:
    """Keeps at most ``limit`` points: the lowest and the highest of each bin, so that no spike is lost.

    A bin without any number remains as one gap.
    """
    if len(xs) <= limit:
        return list(xs), list(ys)
    bins = limit // 2
    edges = [len(xs) * i // bins for i in range(bins + 1)]
    kept: list[int] = []
    for start, end in pairwise(edges):
        known = [(y, i) for i in range(start, end) if (y := ys[i]) is not None]
        if known:
            kept += sorted({min(known)[1], max(known)[1]})
        else:
            kept.append(start)
    return [xs[i] for i in kept], [ys[i] for i in kept]


def moving_mean(
    xs: Sequence[int], ys: Numbers, windows: int = 25, points: int = 200
) -> tuple[list[int], list[float]]:
    """Centred moving mean over 1/``windows`` of the points, at ``points`` of them; gaps do not count.

    Near the ends half of the window remains, so that a single noisy value does not bend the curve.
    """
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    sums = [0.0]
    for _, y in known:
        sums.append(sums[-1] + y)
    half = len(known) // (2 * windows)
    places = sorted({round(i * (len(known) - 1) / (points - 1)) for i in range(points)})
    means = []
    for place in places:
        start, end = max(place - half, 0), min(place + half + 1, len(known))
        means.append((sums[end] - sums[start]) / (end - start))
    return [known[place][0] for place in places], means


def phase_blocks(steps: Iterable[tuple[int, str]], end: int) -> list[Block]:
    """Groups consecutive steps of a phase into blocks; where phases alternate quickly, a block mixes them.

    Args:
        steps: (step, colour of the phase) of each training record, in order.
        end: the first step after the run.
    """
    runs = [(phase, next(iter(group))[0]) for phase, group in groupby(steps, key=lambda item: item[1])]
    starts = [start for _, start in runs] + [end]
    pure = [Block(starts[i], starts[i + 1], {phase: 1.0}) for i, (phase, _) in enumerate(runs)]
    narrowest = _MIN_BAND * end
    blocks: list[Block] = []
    for is_narrow, group in groupby(pure, key=lambda block: block.end - block.start < narrowest):
        neighbours = list(group)
        blocks += _merged(neighbours, narrowest) if is_narrow else neighbours
    return blocks


def _merged(blocks: list[Block], narrowest: float) -> list[Block]:
    """Merges blocks until they are wide enough, in pairs: an even alternation then has even shares."""
    merged: list[Block] = []
    pending: list[Block] = []
    for block in blocks:
        pending.append(block)
        if len(pending) % 2 == 0 and block.end - pending[0].start >= narrowest:
            merged.append(_mixed(pending))
            pending = []
    if pending and merged:
        return [*merged[:-1], _mixed([merged[-1], *pending])]
    return [*merged, _mixed(pending)] if pending else merged


def _mixed(blocks: list[Block]) -> Block:
    width = blocks[-1].end - blocks[0].start
    shares: dict[str, float] = {}
    for block in blocks:
        for phase, share in block.shares.items():
            shares[phase] = shares.get(phase, 0.0) + share * (block.end - block.start) / width
    return Block(blocks[0].start, blocks[-1].end, shares)


@dataclass(frozen=True)
class Axis:
    """A vertical axis from ``low`` to ``high``, logarithmic where the values span it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool

    def share(self, value: float) -> float:
        """The height of ``value`` on the axis: 0 at the bottom, 1 at the top."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis_for(
    values: Sequence[float], floor: float | None = None, intervals: int = 5, log: bool = False
) -> Axis:
    """An axis with round ends that holds all values, with about ``intervals`` ticks.

    It is logarithmic if all values are positive and most of them would be squashed against its bottom,
    or with ``log``.
    """
    low, high = min(values), max(values)
    middle = sorted(values)[len(values) // 2]
    if low > 0 and (log or high > 30 * middle):
        bottom = math.floor(math.log10(low))
        top = max(math.ceil(math.log10(high)), bottom + 1)
        every = max(1, -(-(top - bottom) // intervals))
        ticks = tuple(10.0**power for power in range(bottom, top + 1, every))
        return Axis(10.0**bottom, 10.0**top, ticks, True)
    low = low if floor is None else min(low, floor)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    unit = _round_unit((high - low) / intervals)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return Axis(first * unit, last * unit, tuple(i * unit for i in range(first, last + 1)), False)


def _round_unit(size: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least ``size``."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def short_number(value: float | None) -> str:
    """Three significant digits, with k, M and G; the page's script does the same."""
    if value is None:
        return "–"
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / limit if letter != 'k' else value / 1e3:.3g}{letter}"
    if size >= 1000:
        return f"{value:.0f}"
    if value and size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def draw(panels: Sequence[Panel], blocks: Sequence[Block], end: int) -> tuple[str, list[dict]]:
    """The HTML of a chart's panels over one axis of steps [0, end], and what its hover needs to know."""
    pieces, data = [], []
    for number, panel in enumerate(panels):
        values = [y for line in panel.all_series for y in line.ys if y is not None]
        axis = axis_for(values, panel.floor, intervals=2 if number else 5)  # panels below the first are low
        hover = [_hover_points(line) for line in panel.all_series]
        keys = "".join(_key(line, points["y"]) for line, points in zip(panel.series, hover, strict=False))
        if panel.band:
            keys += _band_key(panel.band, hover[-2]["y"], hover[-1]["y"])
        pieces.append(
            f'<div class="legend">{keys}{_scale(axis)}</div>'
            f'<div class="frame"><div class="ys">{_ticks(axis)}</div>'
            f'<div class="plot" tabindex="0">{_svg(panel, axis, blocks, end)}</div></div>'
        )
        data.append({"low": axis.low, "high": axis.high, "log": axis.is_log, "series": hover})
    return "".join(pieces) + _strip(blocks, end) + _steps_axis(end), data


def draw_over(names: Sequence[str], unit: str, panel: Panel, log: bool = False) -> str:
    """The HTML of curves over something other than steps, without a hover.

    Args:
        names: of the places from left to right; the ``xs`` of a curve count them from 0.
        unit: of the names.
        panel: the curves.
        log: asks for a logarithmic axis.
    """
    end = len(names)
    axis = axis_for([y for line in panel.series for y in line.ys if y is not None], panel.floor, log=log)
    keys = "".join(f'<span class="key {x.colour}"><i></i>{html.escape(x.label)}</span>' for x in panel.series)
    below = "".join(f'<span style="left:{100 * i / end:.2f}%">{name}</span>' for i, name in enumerate(names))
    return (
        f'<div class="legend">{keys}{_scale(axis)}</div><div class="frame"><div class="ys">{_ticks(axis)}</div>'
        f'<div class="still">{_svg(panel, axis, [], end)}</div></div>'
        f'<div class="frame"><div class="ys"></div><div class="xs">{below}<em>{unit}</em></div></div>'
    )


def _scale(axis: Axis) -> str:
    return '<span class="scale">log scale</span>' if axis.is_log else ""


def _ticks(axis: Axis) -> str:
    return "".join(
        f'<span style="bottom:{100 * axis.share(tick):.2f}%">{short_number(tick)}</span>' for tick in axis.ticks
    )


def _key(line: Series, shown: Numbers) -> str:
    gaps = sum(y is None for y in line.ys)
    note = f"<em>{gaps} not finite</em>" if gaps else ""
    label = html.escape(line.label)
    return f'<span class="key {line.colour}"><i></i>{label} <b>{_last(shown)}</b>{note}</span>'


def _band_key(band: Band, lows: Numbers, highs: Numbers) -> str:
    values = f"<b>{_last(lows)}</b> to <b>{_last(highs)}</b>"
    return f'<span class="key area {band.low.colour}"><i></i>{html.escape(band.label)} {values}</span>'


def _last(shown: Numbers) -> str:
    return short_number(next((y for y in reversed(shown) if y is not None), None))


def _svg(panel: Panel, axis: Axis, blocks: Sequence[Block], end: int) -> str:
    shapes = [
        _rectangle(block, end, f"band {colour}", 0, 1)
        for block in blocks
        for colour, share in block.shares.items()
        if share == 1 and block.end - block.start >= _MIN_BAND * end
    ]
    for tick in axis.ticks:
        y = _HEIGHT * (1 - axis.share(tick))
        shapes.append(f'<path class="grid" d="M0 {y:.2f}H{_WIDTH}"/>')
    if panel.band:
        shapes.append(_area(panel.band, axis, end))
    for line in panel.series:
        shapes += _curve(line, axis, end)
    return _box(shapes)


def _area(band: Band, axis: Axis, end: int) -> str:
    """Fills the area between two curves, as smooth as curves are drawn."""

    def corners(line: Series) -> list[str]:
        known = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
        places = known if len(known) < _FEW else list(zip(*moving_mean(line.xs, line.ys), strict=True))
        return [f"{_WIDTH * x / end:.1f} {_HEIGHT * (1 - axis.share(y)):.2f}" for x, y in places]

    outline = "L".join([*corners(band.low), *reversed(corners(band.high))])
    return f'<path class="area {band.low.colour}" d="M{outline}Z"/>'


def _curve(line: Series, axis: Axis, end: int) -> list[str]:
    def path(xs: Sequence[int], ys: Numbers) -> str:
        text, joined = [], False
        for x, y in zip(xs, ys, strict=True):
            if y is None:
                joined = False
                continue
            place = f"{_WIDTH * x / end:.1f} {_HEIGHT * (1 - axis.share(y)):.2f}"
            text.append(("L" if joined else "M") + place)
            joined = True
        return "".join(text)

    known = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
    if len(known) < _FEW:  # few points are shown as points: strokes of no length with round ends
        dots = "".join(path([x], [y]) + "h0" for x, y in known)
        curve = path(line.xs, line.ys)
        return [f'<path class="line {line.colour}" d="{curve}"/><path class="dots {line.colour}" d="{dots}"/>']
    noisy, smooth = path(*thin(line.xs, line.ys)), path(*moving_mean(line.xs, line.ys))
    return [f'<path class="noise {line.colour}" d="{noisy}"/><path class="line {line.colour}" d="{smooth}"/>']


def _hover_points(line: Series) -> dict:
    """The points that the cursor shows: all of them, or the moving mean of a thinned curve."""
    is_thinned = len(line.xs) > MAX_POINTS
    xs, ys = moving_mean(line.xs, line.ys) if is_thinned else (line.xs, line.ys)
    return {"x": list(xs), "y": [None if y is None else float(f"{y:.5g}") for y in ys], "colour": line.colour}


def _strip(blocks: Sequence[Block], end: int) -> str:
    """Draws the thin line under a chart that shows which phase ran when, mixed blocks by their shares."""
    shapes = []
    for block in blocks:
        below = 0.0
        for colour, share in sorted(block.shares.items()):
            wider = Block(block.start, min(block.end + end / _WIDTH, end), {})  # no seam before the next
            shapes.append(_rectangle(wider, end, colour, below, share))
            below += share
    return f'<div class="frame strip"><div class="ys"></div>{_box(shapes)}</div>'


def _rectangle(block: Block, end: int, css: str, below: float, share: float) -> str:
    x, width = _WIDTH * block.start / end, _WIDTH * (block.end - block.start) / end
    y, height = _HEIGHT * (1 - below - share), _HEIGHT * share
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _steps_axis(end: int) -> str:
    unit = max(1, round(_round_unit(end / 5)))
    ticks = [step for step in range(0, end + 1, unit) if step <= 0.9 * end]
    labels = "".join(
        f'<span style="left:{100 * step / end:.2f}%">{short_number(step)}</span>' for step in ticks
    )
    return f'<div class="frame"><div class="ys"></div><div class="xs">{labels}<em>step</em></div></div>'


def _box(shapes: Sequence[str]) -> str:
    attributes = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg {attributes}>{''.join(shapes)}</svg>"


def phase_colour(number: int) -> str:
    """The colour of the phase of that number, counted from 0; a second round of the same ones is dashed."""
    return _PHASES[number % len(_PHASES)] + (" dashed" if number >= len(_PHASES) else "")
