"""Writes one self-contained HTML file about a run: its curves, samples before and after, and its config.

The page needs no network and may show anything that a model wrote: every text is escaped, the numbers sit in
a data block that cannot end early, and the page's policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_jax.core.writing import write_text
from hybrid_jax.core.yaml_text import dump_yaml
from hybrid_jax.reports.change import METHOD, Change, change_of, signed
from hybrid_jax.reports.charts import short_number
from hybrid_jax.reports.conversations import conversations_section
from hybrid_jax.reports.flags import find_flags
from hybrid_jax.reports.glossary import GLOSSARY, glossary_entry
from hybrid_jax.reports.memory import memory_section
from hybrid_jax.reports.metrics import headline_charts, loss_entry, speed_charts, training_charts
from hybrid_jax.reports.page import Figures, chart_grid, escaped, folded, section
from hybrid_jax.reports.rewarded import rewarded_phases
from hybrid_jax.reports.rewards import rewards_sections, titled
from hybrid_jax.reports.run import Run, read_run
from hybrid_jax.reports.samples import samples_section
from hybrid_jax.reports.speed import speed_figures
from hybrid_jax.runs.files import fetched
from hybrid_jax.training.time_left import EVALUATION

_TEMPLATE = Path(__file__).with_name("template.html")


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run directory and returns its path; for a bucket, that of a local copy.

    Raises:
        UserError: there is no such directory, or it holds no metrics yet.
    """
    run = read_run(files := fetched(run_dir))
    figures = Figures(run)
    shown = (conversations_section(run), samples_section(run))
    body = "\n".join([_headline(run), _progress(run, figures), *shown, *_details(run, figures)])
    page = _fill(body, {"end": run.end, "panels": figures.hover}, run.name)
    path = files.folder / "report.html"
    write_text(path, page)
    files.upload()
    return path


# --- the page --------------------------------------------------------------------------------------------


def _fill(body: str, data: dict[str, Any], name: str) -> str:
    template = _TEMPLATE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"body": body, "data": _data_block(data), "name": escaped(name), "script_hash": f"sha256-{digest}"}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: braces in a part stay


def _data_block(data: Any) -> str:
    """Writes JSON that no HTML parser can mistake for markup."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- sections --------------------------------------------------------------------------------------------


def _headline(run: Run) -> str:
    named = [
        (key, part["name"]) for key, part in run.config.items() if isinstance(part, Mapping) and "name" in part
    ]
    subject = " · ".join(f"{escaped(key)} {escaped(name)}" for key, name in named)
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in _tiles(run)
    )
    return (
        f'<header><h1>{escaped(run.name)}</h1><p class="subject">{subject}</p>{_verdict(run)}{_warning(run)}'
        f'<dl class="tiles">{tiles}</dl></header>'
    )


def _score_change(run: Run) -> Change | None:
    """The change from the last evaluation before any reward to the last; evaluation s is before update s."""
    begin = run.first_reward_step
    return None if begin is None else change_of(run, "evaluation/score", begin)


def _verdict(run: Run) -> str:
    phases = rewarded_phases(run)
    sentences = [
        f"The reward{f' of {escaped(phase.phase, 100)}' if len(phases) > 1 else ''} gave no signal: in each "
        "rollout all responses scored the same, so there was nothing to learn from it."
        for phase in phases
        if phase.phase and not phase.has_signal
    ]
    kind, method = "", ""
    if change := _score_change(run):
        sentences.append(_change_sentence(run, change))
        kind = {1: " up", -1: " down", 0: ""}[change.direction]
        has_method = change.interval and not change.is_exactly_zero
        method = f'<p class="method">{METHOD.format(change.num_prompts)}.</p>' if has_method else ""
    return f'<p class="verdict{kind}">{" ".join(sentences)}</p>{method}' if sentences else ""


def _change_sentence(run: Run, change: Change) -> str:
    (step, before), (last, after) = change.before, change.after
    untrained = "the pretrained model" if _is_pretrained(run) else "the untrained start"
    start = f"{escaped(run.before_reward, 100)} alone" if run.before_reward and step > 0 else untrained
    numbers = f"from {_score(before)} ({start}, step {step:,}) to <b>{_score(after)}</b> at step {last:,}"
    if change.interval is None:
        why = (
            f"only {change.num_prompts} prompts" if change.num_prompts else "this run kept no scores by prompt"
        )
        return (
            f"The held-out score went {numbers}; whether that is more than chance cannot be told ({why})."
            if before != after
            else f"The held-out score is {_score(after)}, as it was before the reward."
        )
    if change.is_exactly_zero:
        same = f"Training with reward left the held-out score at <b>{_score(after)}</b>"
        return f"{same}: no prompt scored differently."
    difference = f"{signed(change.difference)}, 95 % interval {change.range}"
    if change.direction == 0:
        return (
            f"Training with reward made no clear difference: the held-out score went {numbers} ({difference}), "
            "which may be chance."
        )
    verb = "raised" if change.direction > 0 else "lowered"
    return f"Training with reward {verb} the held-out score {numbers} ({difference})."


def _is_pretrained(run: Run) -> bool:
    """Tells whether the model came out of a folder."""
    model = run.config.get("model")
    return isinstance(model, Mapping) and bool(model.get("path"))


def _score(value: float) -> str:
    """Writes three decimals with a proper minus sign; what rounds to 0 has none."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _warning(run: Run) -> str:
    lines = []
    for phase, title in titled(run):
        if count := len(find_flags(phase).gaming):
            lines.append(f"{'1 sign' if count == 1 else f'{count} signs'} of reward hacking: see {title}.")
        if (silent := list(phase.silent_parts)) and phase.has_signal:
            lines.append(f"No signal in training from {escaped(', '.join(silent), 200)}: see {title}.")
    return "".join(f'<p class="warning">{line}</p>' for line in lines)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and note, as HTML."""
    counts: dict[str, int] = {}
    ends = [*(step for step, _ in run.training), run.num_steps][1:]
    for (step, phase), end in zip(run.training, ends, strict=True):
        counts[phase] = counts.get(phase, 0) + end - step
    shares = " · ".join(f"{count:,} {escaped(run.label(phase), 100)}" for phase, count in counts.items())
    seconds = max((r["seconds"] for r in run.records if isinstance(r.get("seconds"), int | float)), default=0)
    tiles = []
    if score := run.value("evaluation/score"):
        tiles.append(("Held-out score", _score(score[1]), _score_note(_score_change(run))))
    for phase in (phase for phase in rewarded_phases(run) if not phase.is_first):
        whose = escaped(phase.phase, 100)
        if score := run.value(phase.held_out("score")):
            tiles.append((f"Held-out score of {whose}", _score(score[1]), "at the end"))
        elif score := run.value(phase.trained("score")):  # of a run that measured the first reward alone
            tiles.append((f"Score of {whose}", _score(score[1]), "in training, at the end"))
    for metric in run.curves:
        phase, name = run.named(metric)
        if name == "accuracy" and metric.startswith(EVALUATION) and (accuracy := run.value(metric)):
            whose = f" of {escaped(phase, 100)}" if phase else ""
            tiles.append((f"Held-out accuracy{whose}", f"{accuracy[1]:.1%}", "at the end"))
    tiles += _kl_tiles(run)
    if perplexity := run.value("evaluation/perplexity"):
        tiles.append(("Held-out perplexity", short_number(perplexity[1]), "at the end"))
    else:
        tiles += [
            (f"Loss of {escaped(phase, 100)}", short_number(loss[1]), "in training, at the end")
            for phase in run.kinds
            if (loss := run.value(f"{phase}/loss"))
        ]
    tiles.append(("Steps", f"{run.num_steps:,}", shares))
    tiles.append(("Duration", _duration(seconds), "wall clock"))
    return tiles


def _kl_tiles(run: Run) -> list[tuple[str, str, str]]:
    """The held-out KL, or that of each phase that logs one."""
    metrics = ["evaluation/kl"] if "evaluation/kl" in run.curves else [f"{phase}/kl" for phase in run.kinds]
    found = {metric: kl[1] for metric in metrics if (kl := run.value(metric))}
    tiles = []
    for metric, kl in found.items():
        whose = f" of {escaped(metric.partition('/')[0], 100)}" if len(found) > 1 else ""
        note = "a response, at the end" if kl >= 0 else "a response: an estimate, 0 within its noise"
        tiles.append((f"KL to the reference{whose}", f"{short_number(kl).replace('-', '−')} nats", note))
    return tiles


def _score_note(change: Change | None) -> str:
    if change is None:
        return "at the end"
    if change.interval is None:
        return f"{_score(change.before[1])} before the reward"
    difference = "the same for each prompt" if change.is_exactly_zero else change.range
    return f"{_score(change.before[1])} before the reward, {difference}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _progress(run: Run, figures: Figures) -> str:
    keys = "".join(
        f'<span><i class="{run.colour(phase)}" style="background:var(--c)"></i>'
        f"<span>{escaped(run.label(phase), 100)} steps</span></span>"
        for phase in run.kinds
    )
    first, others = ([c for c in charts if figures.can_draw(c)] for charts in headline_charts(run))
    room = len(first) % 2 if first else 2  # two charts stand side by side
    return section(
        "Progress",
        chart_grid(figures, [*first, *others[:room]], "wide"),
        f'<div class="phases">{keys}</div>',
    )


def _details(run: Run, figures: Figures) -> list[str]:
    rewards = rewards_sections(run, figures)
    charts = [*headline_charts(run)[1], *training_charts(run)]
    memory = memory_section(run, figures)
    learning = section("Training", chart_grid(figures, (c for c in charts if not figures.has_drawn(c))))
    speed = section("Speed and memory", speed_figures(run) + chart_grid(figures, speed_charts(run)))
    rest = section("More metrics", chart_grid(figures, figures.rest()))
    return [*rewards, memory, learning, speed, rest, section("Particulars", _particulars(run))]


def _particulars(run: Run) -> str:
    folds = []
    if run.config:
        text = dump_yaml(run.config, unicode=True)
        folds.append(("Config", f"<pre>{escaped(text, 100_000)}</pre>"))
    if run.environment:
        rows = "".join(
            f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in _flat(run.environment)
        )
        folds.append(("Environment", f'<dl class="rows">{rows}</dl>'))
    rows = ""
    for metric in run.curves:
        name = metric if metric in GLOSSARY else run.named(metric)[1]
        what, wrong = glossary_entry(loss_entry(run, metric) if name == "loss" else name) or ("", "")
        rows += f"<dt><code>{escaped(metric)}</code></dt><dd>{escaped(what)} <span>{escaped(wrong)}</span></dd>"
    folds.append(("Glossary", f'<dl class="rows">{rows}</dl>'))
    return "".join(folded(title, body) for title, body in folds)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [
            row for key, item in value.items() for row in _flat(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, value)]
