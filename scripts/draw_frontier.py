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
    """The points of the runs of each method, and the means of each strength in the order of their KL."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["method"] == method]
        means = []
        for strength in dict.fromkeys(run["strength"] for run in runs):
            of_strength = [run for run in runs if run["strength"] == strength]
            means.append(tuple(statistics.mean(run[name] for run in of_strength) for name in ("kl", SHOWN)))
        found[method] = [(run["kl"], run[SHOWN]) for run in runs], sorted(means)
    return found


def spread(places: Sequence[Point], width: float, gap: float) -> list[float]:
    """Heights of labels in their order, ``gap`` apart where places are less than ``width`` apart."""
    order = sorted(range(len(places)), key=lambda i: places[i][1])
    heights = [height for _, height in places]
    for _ in range(100):
        for low, high in itertools.combinations(order, 2):
            lack = gap - (heights[high] - heights[low])
            if lack > 0 and abs(places[high][0] - places[low][0]) < width:
                heights[low], heights[high] = heights[low] - lack / 2, heights[high] + lack / 2
    return heights


def draw(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(8.6, 5.2), layout="constrained")
    start = results["start"]["kl"], results["start"][SHOWN]
    ends = {}
    for method, (runs, means) in lines(results).items():
        colour = COLOURS[method]
        axes.plot(*zip(start, *means, strict=True), color=colour, lw=2, zorder=2, solid_capstyle="round")
        axes.scatter(*zip(*runs, strict=True), s=18, color=colour, alpha=0.45, linewidths=0, zorder=3)
        axes.scatter(*zip(*means, strict=True), s=64, color=colour, edgecolors="white", zorder=4)
        ends[method] = means[-1]
    top = max(run[SHOWN] for run in results["runs"])
    axes.set(xlim=(0, axes.get_xlim()[1] * 1.05), ylim=(start[1] - 0.1 * top, 1.35 * top))
    best = [start, *((each["kl"], each[SHOWN]) for each in results["best_of_n"])]
    axes.plot(*zip(*best, strict=True), color=GREY, lw=1.3, ls=(0, (4, 3)), zorder=1)
    axes.annotate("best of n by judge A\nleaves the picture", (0.24, 1.27 * top), color=GREY, va="center")
    axes.scatter(*start, s=150, marker="*", color="black", zorder=5, clip_on=False)
    axes.annotate("start", start, xytext=(9, -13), textcoords="offset points", fontweight="bold")
    heights = spread(list(ends.values()), 0.8, 0.07 * top)
    for (name, (x, _)), height in zip(ends.items(), heights, strict=True):
        beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontweight": "bold"}
        axes.annotate(name, (x, height), color=COLOURS[name], **beside)
    axes.set(
        xlabel="KL to the start, nats a response",
        ylabel="mean margin of the held-out judge B, standard deviations",
    )
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    title = "What a judge that no method saw gains by a nat of KL; points are seeds, circles their means"
    axes.set_title(title, loc="left", fontsize=11.5)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.output)


if __name__ == "__main__":
    main()
