"""One self-contained HTML file that tells a run: its curves, samples before and after, and its config.

The page needs no network and may show anything that a model wrote: every text is escaped, the numbers sit in
a data block that cannot end early, and the page's policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hybrid_jax.core.cli import ArgumentParser, run_command
from hybrid_jax.core.config import load_yaml
from hybrid_jax.core.registry import UserError
from hybrid_jax.report_charts import Block, Panel, Series, draw, phase_blocks, phase_class, short_number
from hybrid_jax.report_metrics import CHARTS, GLOSSARY, HEADLINE_CHARTS, SPEED_CHARTS, Chart, Line, pair
from hybrid_jax.report_speed import speed_figures
from hybrid_jax.training.loggers import METRICS_FILE, SAMPLES_FILE, read_records, without_secrets
from hybrid_jax.training.run_files import RunFiles, fetched

_TEMPLATE = Path(__file__).with_name("report_template.html")
_MAX_PROMPTS, _MAX_TEXT = 8, 2000
_PHASE_NAMES = {"sft": "SFT", "ppo": "PPO"}


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run directory and returns its path; of one in a bucket, that of a copy.

    Raises:
        UserError: there is no such directory, or it holds no metrics yet.
    """
    run = _read_run(files := fetched(run_dir))
    figures = _Figures(run)
    body = "\n".join([_headline(run), _progress(run, figures), _samples(run), *_details(run, figures)])
    page = _fill(body, {"end": run.end, "panels": figures.hover}, run.name)
    path = files.folder / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")  # a model may write half a surrogate pair
    files.upload()
    return path


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="python -m hybrid_jax.report", description="Writes report.html into a run directory."
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    write_report(run_dir := parser.parse_args(arguments).run.rstrip("/"))
    print(f"{run_dir}/report.html")


# --- the run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    name: str
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float | None]]]:
        """Steps and values of every metric, a value that is no finite number as a gap."""
        curves: dict[str, tuple[list[int], list[float | None]]] = {}
        for record in self.records:
            for name, value in record.items():
                if "/" in name and (value is None or isinstance(value, int | float)):
                    xs, ys = curves.setdefault(name, ([], []))
                    xs.append(record["step"])
                    ys.append(float(value) if value is not None and math.isfinite(value) else None)
        return {name: curve for name, curve in curves.items() if any(y is not None for y in curve[1])}

    @cached_property
    def training(self) -> list[tuple[int, str]]:
        return [(r["step"], r["phase"]) for r in self.records if r["phase"] != "evaluation"]

    @cached_property
    def num_steps(self) -> int:
        return max((step + 1 for step, _ in self.training), default=0)

    @cached_property
    def end(self) -> int:
        """Where the axis of steps ends."""
        return max(self.num_steps, *(record["step"] for record in self.records), 1)

    @cached_property
    def blocks(self) -> list[Block]:
        return phase_blocks(self.training, max(self.num_steps, 1))

    @cached_property
    def first_ppo_step(self) -> int | None:
        return next((step for step, phase in self.training if phase == "ppo"), None)

    def value(self, metric: str, until: int | None = None) -> tuple[int, float] | None:
        """The last (step, value) of a metric, or the last one up to the step ``until``."""
        xs, ys = self.curves.get(metric, ([], []))
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and (until is None or x <= until)]
        return known[-1] if known else None


def _read_run(files: RunFiles) -> _Run:
    if not (run_dir := files.folder).is_dir():
        raise UserError(f"no run directory {files.name!r}")
    records = [r for r in read_records(run_dir / METRICS_FILE) if isinstance(r.get("phase"), str)]
    if not records:
        raise UserError(f"{files.name}/{METRICS_FILE} holds no metrics yet; train first, or name another run")
    samples = [r for r in read_records(run_dir / SAMPLES_FILE) if {"index", "prompt", "response"} <= r.keys()]
    config_file, environment_file = run_dir / "config.yaml", run_dir / "environment.json"
    config = without_secrets(load_yaml(config_file)) if config_file.is_file() else {}
    try:
        environment = json.loads(environment_file.read_text()) if environment_file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{environment_file}: not JSON: {error}") from error
    return _Run(run_dir.resolve().name, records, samples, config, environment)


# --- the page --------------------------------------------------------------------------------------------


def _fill(body: str, data: dict[str, Any], name: str) -> str:
    template = _TEMPLATE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"body": body, "data": _data_block(data), "name": _text(name), "script_hash": f"sha256-{digest}"}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: parts stay as they are


def _data_block(data: Any) -> str:
    """JSON that no HTML parser can mistake for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(value: object, limit: int = _MAX_TEXT) -> str:
    """Text as HTML, cut at ``limit`` characters, control characters shown as such."""
    text = str(value)
    text = text[:limit] + "…" if len(text) > limit else text
    return html.escape(
        "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    )


class _Figures:
    """Draws charts and remembers their numbers for the hover, in the order of the page."""

    def __init__(self, run: _Run):
        self._run = run
        self.hover: list[dict] = []
        self._drawn: set[str] = set()

    def chart(self, chart: Chart) -> str:
        panels = [Panel(lines, floor) for names, floor in chart.panels if (lines := self._lines(names))]
        if not panels:
            return ""
        drawing, hover = draw(panels, self._run.blocks, self._run.end)
        self.hover += hover
        title = f"<figcaption><h3>{_text(chart.title)}</h3></figcaption>"
        return f'<figure class="chart">{title}{drawing}{_note(chart.glossary)}</figure>'

    def has_drawn(self, chart: Chart) -> bool:
        return any(line.metric in self._drawn for lines, _ in chart.panels for line in lines)

    def rest(self) -> list[Chart]:
        """A chart for each metric that no chart has shown."""
        names = sorted({name.partition("/")[2] for name in self._run.curves if name not in self._drawn})
        charts = []
        for name in names:
            metrics = [m for m in self._run.curves if m.partition("/")[2] == name and m not in self._drawn]
            lines = [Line(metric, _source_label(metric)) for metric in metrics]
            charts.append(Chart(_words(name), [(lines, None)], name.partition("/")[0]))
        return charts

    def _lines(self, names: Sequence[Line]) -> list[Series]:
        found = [line for line in names if line.metric in self._run.curves]
        self._drawn |= {line.metric for line in found}
        return [
            Series(line.label, line.colour or _colour(line.metric), *self._run.curves[line.metric])
            for line in found
        ]


def _note(entry: str | None) -> str:
    return f'<p class="note">{_text(" ".join(GLOSSARY[entry]))}</p>' if entry in GLOSSARY else ""


def _colour(metric: str) -> str:
    phase = metric.partition("/")[0]
    return "eval" if phase == "evaluation" else phase_class(phase)


def _source_label(metric: str) -> str:
    phase = metric.partition("/")[0]
    return "held-out" if phase == "evaluation" else _PHASE_NAMES.get(phase, phase)


def _words(name: str) -> str:
    words = name.replace("reward/", "Reward: ").replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


# --- sections --------------------------------------------------------------------------------------------


def _headline(run: _Run) -> str:
    named = [
        (key, part["name"]) for key, part in run.config.items() if isinstance(part, Mapping) and "name" in part
    ]
    subject = " · ".join(f"{_text(key)} {_text(name)}" for key, name in named)
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in _tiles(run)
    )
    return (
        f'<header><h1>{_text(run.name)}</h1><p class="subject">{subject}</p>{_verdict(run)}'
        f'<dl class="tiles">{tiles}</dl></header>'
    )


def _sft_level(run: _Run) -> tuple[int, float] | None:
    """The held-out score before PPO began: an evaluation at step s is made before update s."""
    return run.value("evaluation/score", until=run.first_ppo_step) if run.first_ppo_step is not None else None


def _verdict(run: _Run) -> str:
    before, after = _sft_level(run), run.value("evaluation/score")
    if before is None or after is None or before[0] == after[0]:
        return ""
    change = after[1] - before[1]
    verb = "raised" if change > 0 else "lowered" if change < 0 else "left"
    start = "SFT alone" if before[0] > 0 else "the untrained start"
    return (
        f'<p class="verdict">Training with reward {verb} the held-out score from {before[1]:.3f} '
        f"({start}, step {before[0]:,}) to <b>{after[1]:.3f}</b> at step {after[0]:,}.</p>"
    )


def _tiles(run: _Run) -> list[tuple[str, str, str]]:
    counts: dict[str, int] = {}
    ends = [*(step for step, _ in run.training), run.num_steps][1:]
    for (step, phase), end in zip(run.training, ends, strict=True):
        counts[phase] = counts.get(phase, 0) + end - step
    shares = " · ".join(f"{count:,} {_text(_PHASE_NAMES.get(phase, phase))}" for phase, count in counts.items())
    seconds = max((r["seconds"] for r in run.records if isinstance(r.get("seconds"), int | float)), default=0)
    tiles = []
    if score := run.value("evaluation/score"):
        before = _sft_level(run)
        tiles.append(
            ("Held-out score", f"{score[1]:.3f}", f"{before[1]:.3f} before PPO" if before else "at the end")
        )
    if kl := run.value("evaluation/kl") or run.value("ppo/kl"):
        tiles.append(("KL to the reference", f"{short_number(kl[1])} nats", "a response, at the end"))
    if perplexity := run.value("evaluation/perplexity"):
        tiles.append(("Held-out perplexity", short_number(perplexity[1]), "at the end"))
    elif loss := run.value("sft/loss"):
        tiles.append(("SFT loss", short_number(loss[1]), "nats a token, at the end"))
    tiles.append(("Steps", f"{run.num_steps:,}", shares))
    tiles.append(("Duration", _duration(seconds), "wall clock"))
    return tiles


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><header><h2>{title}</h2>{note}</header>{body}</section>" if body else ""


def _chart_grid(figures: _Figures, charts: Sequence[Chart], css: str = "") -> str:
    drawn = "".join(figures.chart(chart) for chart in charts)
    return f'<div class="charts {css}">{drawn}</div>' if drawn else ""


def _progress(run: _Run, figures: _Figures) -> str:
    phases = list(dict.fromkeys(phase for _, phase in run.training))
    keys = "".join(
        f'<span><i class="{phase_class(phase)}" style="background:var(--c)"></i>'
        f"<span>{_text(_PHASE_NAMES.get(phase, phase))} steps</span></span>"
        for phase in phases
    )
    note = f'<div class="phases">{keys}</div>'
    body = _chart_grid(figures, HEADLINE_CHARTS, "wide") or _chart_grid(figures, CHARTS[:2], "wide")
    return _section("Progress", body, note)


def _details(run: _Run, figures: _Figures) -> list[str]:
    parts = list(dict.fromkeys(name.partition("/")[2] for name in run.curves if "/reward/" in name))
    reward_charts = [Chart(_words(part.removeprefix("reward/")), [(pair(part), None)], None) for part in parts]
    note = f"<p>{_text(' '.join(GLOSSARY['reward']))}</p>"
    rewards = _section("Parts of the reward", _chart_grid(figures, reward_charts), note)
    learning = _section(
        "Training", _chart_grid(figures, [chart for chart in CHARTS if not figures.has_drawn(chart)])
    )
    speed = speed_figures(run.records, _PHASE_NAMES) + _chart_grid(figures, SPEED_CHARTS)
    rest = _section("More metrics", _chart_grid(figures, figures.rest()))
    return [
        rewards,
        learning,
        _section("Speed and memory", speed),
        rest,
        _section("Particulars", _particulars(run)),
    ]


def _particulars(run: _Run) -> str:
    folds = []
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        folds.append(("Config", f"<pre>{_text(text, 100_000)}</pre>"))
    if run.environment:
        rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in _flat(run.environment))
        folds.append(("Environment", f'<dl class="rows">{rows}</dl>'))
    rows = ""
    for metric in run.curves:
        name = metric.partition("/")[2]
        what, wrong = (
            GLOSSARY.get(metric) or GLOSSARY.get(name) or GLOSSARY.get(name.partition("/")[0]) or ("", "")
        )
        rows += f"<dt><code>{_text(metric)}</code></dt><dd>{_text(what)} <span>{_text(wrong)}</span></dd>"
    folds.append(("Glossary", f'<dl class="rows">{rows}</dl>'))
    return "".join(f"<details><summary>{title}</summary>{body}</details>" for title, body in folds)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            row for key, item in value.items() for row in _flat(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, value)]


def _samples(run: _Run) -> str:
    by_prompt: dict[int, dict[int, dict[str, Any]]] = {}
    for record in run.samples:
        by_prompt.setdefault(record["index"], {})[record["step"]] = record
    moments = _moments(run, sorted({record["step"] for record in run.samples}))
    cards = "".join(_card(by_prompt[index], moments) for index in sorted(by_prompt)[:_MAX_PROMPTS])
    hidden = len(by_prompt) - _MAX_PROMPTS
    note = (
        f"<p>{hidden} more prompts in {SAMPLES_FILE}</p>"
        if hidden > 0
        else "<p>the same held-out prompts each time</p>"
    )
    return _section("Samples", cards, note)


def _moments(run: _Run, steps: list[int]) -> dict[int, str]:
    """Up to three steps to show: the first, the SFT-only level (else the middle) and the last."""
    if not steps:
        return {}
    first, last = steps[0], steps[-1]
    moments = {first: "Before", last: "After"} if last > first else {first: "Samples"}
    before_ppo = [step for step in steps if run.first_ppo_step is not None and step <= run.first_ppo_step]
    if before_ppo and first < before_ppo[-1] < last:
        moments[before_ppo[-1]] = "SFT only"
    elif len(steps) > 2:
        middle = min(steps[1:-1], key=lambda step: abs(step - (first + last) / 2))
        moments[middle] = "During"
    return dict(sorted(moments.items()))


def _card(answers: dict[int, dict[str, Any]], moments: dict[int, str]) -> str:
    cells = "".join(_answer(answers[step], label) for step, label in moments.items() if step in answers)
    prompt = next(iter(answers.values()))["prompt"]
    title = f'<p class="prompt">{_text(prompt)}</p>'
    return f'<article class="sample">{title}<div class="answers">{cells}</div></article>'


def _answer(record: dict[str, Any], label: str) -> str:
    response = _text(record["response"])
    text = f'<p class="text">{response}</p>' if response.strip() else '<p class="text empty">empty response</p>'
    parts = " · ".join(f"{_text(name)} {_score(value)}" for name, value in (record.get("parts") or {}).items())
    return (
        f'<div class="answer"><p class="when"><span>{label} · step {record["step"]:,}</span>'
        f'<b title="score">{_score(record.get("score"))}</b></p>{text}<p class="parts">{parts}</p></div>'
    )


def _score(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and abs(value) < 100 else short_number(value)


if __name__ == "__main__":
    run_command(main)
