"""The figure of scripts/reproduce_preferences.py: judge B against the KL to the start. Needs matplotlib.

python scripts/draw_frontier.py runs/preferences/results.json docs/preferences_frontier.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"DPO": "#0072B2", "KTO": "#56B4E9", "online DPO": "#009E73", "PPO": "#D55E00", "RLOO": "#CC79A7"}
GREY = "#707070"
SHOWN = "B"
Point = tuple[float, float]


def lines(results: Mapping[str, Any]) -> dict[str, tuple[list[Point], list[Point]]]:
    """Of each method the points of its runs, and the means of each strength in the order of their KL."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["method"] == method]
        means = []
        for strength in dict.fromkeys(run["strength"] for run in runs):
            of_strength = [run for run in runs if run["strength"] == strength]
            means.append(tuple(statistics.mean(run[name] for run in of_strength) for name in ("kl", SHOWN)))
        found[method] = [(run["kl"], run[SHOWN]) for run in runs], sorted(means)
    return found


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least ``gap`` apart, in the same order, as near to the given ones as one sweep finds."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for _ in range(100):
        for low, high in itertools.pairwise(order):
            lack = gap - (placed[high] - placed[low])
            if lack > 0:
                placed[low], placed[high] = placed[low] - lack / 2, placed[high] + lack / 2
    return placed


def draw(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(8.6, 5.4), layout="constrained")
    start = results["start"]["kl"], results["start"][SHOWN]
    best = [start, *((each["kl"], each[SHOWN]) for each in results["best_of_n"])]
    axes.plot(*zip(*best, strict=True), color=GREY, lw=1.2, ls=(0, (4, 3)), zorder=1)
    ends = {"best of 2, 4, 8, 16": (best[-1], GREY)}
    for method, (runs, means) in lines(results).items():
        colour = COLOURS[method]
        axes.plot(*zip(start, *means, strict=True), color=colour, lw=2, zorder=2, solid_capstyle="round")
        axes.scatter(*zip(*runs, strict=True), s=16, color=colour, alpha=0.5, linewidths=0, zorder=3)
        axes.scatter(*zip(*means, strict=True), s=60, color=colour, edgecolors="white", zorder=4)
        ends[method] = means[-1], colour
    axes.scatter(*start, s=150, marker="*", color="black", zorder=5)
    axes.annotate("start", start, xytext=(9, -12), textcoords="offset points", fontweight="bold")
    low, high = axes.get_ylim()
    heights = spread([end[1] for end, _ in ends.values()], 0.05 * (high - low))
    for (name, ((x, _), colour)), height in zip(ends.items(), heights, strict=True):
        place = {"xytext": (10, 0), "textcoords": "offset points", "va": "center", "fontweight": "bold"}
        axes.annotate(name, (x, height), color=colour, **place)
    axes.set(xlabel="KL to the start, nats a response", ylabel="mean margin of the held-out judge B")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(
        "Praise by five methods: what a judge that none of them saw says of it", loc="left", fontsize=12
    )
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
