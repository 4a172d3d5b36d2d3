"""The report's sections on rewards: what each part did, how they were combined, whether to trust the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from hybrid_jax.reports.change import METHOD, Change, change_of, signed
from hybrid_jax.reports.charts import short_number
from hybrid_jax.reports.flags import Flags, find_flags
from hybrid_jax.reports.glossary import GLOSSARY
from hybrid_jax.reports.metrics import Chart, combination_charts, judge_chart, part_chart
from hybrid_jax.reports.page import Figures, chart_grid, escaped, folded, section
from hybrid_jax.reports.rewarded import Rewarded, rewarded_phases
from hybrid_jax.reports.run import Run
from hybrid_jax.reports.samples import answer_text, score_text

_SHOWN_EXTREMES = 2  # of the best and of the worst answers by each part
_MAX_NAME = 40


def rewards_sections(run: Run, figures: Figures) -> list[str]:
    """A section for each phase that learns from a reward, with its name where there are several."""
    return [_section(title, phase, figures) for phase, title in titled(run)]


def titled(run: Run) -> list[tuple[Rewarded, str]]:
    """The phases of the sections on rewards, each with the title of its section as HTML."""
    phases = rewarded_phases(run)
    several = len(phases) > 1
    return [(p, f"Rewards of {escaped(run.label(p.phase), 100)}" if several else "Rewards") for p in phases]


def _section(title: str, phase: Rewarded, figures: Figures) -> str:
    """Flags, charts of the parts, judges and combination, correlations, the best and the worst answers."""
    own = phase.trained("reward/")
    figures.count_as_drawn(metric for metric in phase.run.curves if metric.startswith(own) and "~" in metric)
    pieces = [
        _flags(find_flags(phase)),
        chart_grid(figures, _charts(phase, figures)),
        _changes(phase),
        _heat_table(phase, _correlations(phase)),
        _extremes(phase),
    ]
    return section(title, "".join(pieces), f"<p>{escaped(' '.join(GLOSSARY['reward']))}</p>")


def _charts(phase: Rewarded, figures: Figures) -> Iterator[Chart]:
    yield from (part_chart(phase, part) for part in phase.parts)
    yield from (judge_chart(phase, judge) for judge in phase.judges)
    yield from combination_charts(phase)
    # Only now, when all of the above are drawn, is it known which are left.
    yield from figures.rest("reward/", of=(phase.phase, "") if phase.is_first else (phase.phase,))


# --- flags -----------------------------------------------------------------------------------------------


def _flags(flags: Flags) -> str:
    if not flags.looked_at:
        return ""
    missing = f" Without numbers to look at: {', '.join(flags.not_looked_at)}." if flags.not_looked_at else ""
    thirds = "Numbers from and to are means of the first and the last third of the evaluations with reward. "
    note = (
        f'<p class="note">{thirds if flags.gaming else ""}Looked at: {", ".join(flags.looked_at)}.{missing}</p>'
    )
    found = {"Signs of reward hacking": flags.gaming, "Little or no signal": flags.weakness}
    lists = "".join(
        f"<h3>{title}</h3><ul>{''.join(f'<li>{escaped(sentence)}</li>' for sentence in sentences)}</ul>"
        for title, sentences in found.items()
        if sentences
    )
    if not lists:
        return f'<div class="flags"><h3>Nothing suspicious</h3>{note}</div>'
    return f'<div class="flags found">{lists}{note}</div>'


# --- what changed ----------------------------------------------------------------------------------------


def _changes(phase: Rewarded) -> str:
    """A table of score, parts and judges before any reward and at the end, differences with their intervals."""
    if (begin := phase.run.first_reward_step) is None:
        return ""
    names = {"score": "score", **{part: f"reward/{part}" for part in phase.parts}}
    names |= {f"judge: {judge}": f"judge/{judge}" for judge in phase.judges}
    found = {
        name: change
        for name, metric in names.items()
        if (change := change_of(phase.run, phase.held_out(metric), begin)) and change.interval
    }
    if not found:
        return ""
    rows = "".join(_change_row(name, change, name in phase.silent_parts) for name, change in found.items())
    head = "".join(
        f"<th>{title}</th>" for title in ("", "before reward", "at the end", "difference", "95 % interval", "")
    )
    method = METHOD.format(next(iter(found.values())).num_prompts)
    return (
        '<div class="wide-table"><h3>Held-out change</h3><div class="scroll"><table class="speed"><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">The {method}. Another seed of the run may differ by more.</p></div>'
    )


def _change_row(name: str, change: Change, is_silent: bool) -> str:
    words = {1: "up", -1: "down", 0: "within chance"}[change.direction]
    cells = [
        *(short_number(value) for _, value in (change.before, change.after)),
        signed(change.difference),
        change.range,
        "no signal in training" if is_silent else "unchanged" if change.is_exactly_zero else words,
    ]
    return f"<tr><td>{_name(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


# --- correlations ----------------------------------------------------------------------------------------


def _correlations(phase: Rewarded) -> dict[tuple[str, str], float]:
    """The correlation of each pair of parts, score and length, where it was logged."""
    whole = ("score", "response_length")
    names = [*(part for part in phase.parts if part not in whole), *whole]
    found = {(a, b): phase.late_correlation(a, b) for a, b in combinations(names, 2)}
    return {pair: value for pair, value in found.items() if value is not None}


def _heat_table(phase: Rewarded, correlations: Mapping[tuple[str, str], float]) -> str:
    """Draws a triangle of correlations: the shade shows the size, the number the sign too."""
    if not correlations:
        return ""
    columns = list(dict.fromkeys(a for a, _ in correlations))
    rows = list(dict.fromkeys(b for _, b in correlations))
    head = "".join(f"<th>{_name(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th>{_name(row)}</th>{''.join(_heat(correlations.get((column, row))) for column in columns)}</tr>"
        for row in rows
    )
    note = (
        f"Over the responses of a rollout, the mean {escaped(phase.late)}. The stronger, the "
        "deeper the shade. A pair is missing where one of them was the same for all."
    )
    return (
        '<div class="wide-table"><h3>Correlations</h3><div class="scroll"><table class="heat">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="note">{note}</p></div>'
    )


def _heat(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    colour = "orange" if value >= 0 else "blue"
    return f'<td class="{colour}" style="--share:{55 * min(abs(value), 1.0):.0f}%">{_signed(value)}</td>'


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _name(name: str) -> str:
    return "response length" if name == "response_length" else escaped(name, _MAX_NAME)


# --- best and worst answers ------------------------------------------------------------------------------


def _extremes(phase: Rewarded) -> str:
    """The best and the worst answers by each part and judge at the last evaluation that has any."""
    run = phase.run
    last = max((record["step"] for record in run.extremes), default=0)
    by_part: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in run.extremes:
        mark = record["extreme"]
        if record["step"] != last or not isinstance(mark, Mapping) or mark.get("rank") not in ("best", "worst"):
            continue
        if phase.owns(part := str(mark.get("part"))):
            by_part.setdefault(part, {"best": [], "worst": []})[mark["rank"]].append(record)
    if not by_part:
        return ""
    folds = "".join(_extremes_of(part, ranks, part in phase.judges) for part, ranks in by_part.items())
    return f'<div class="extremes"><h3>Best and worst answers at step {last:,}</h3>{folds}</div>'


def _extremes_of(part: str, ranks: Mapping[str, Sequence[dict[str, Any]]], is_judge: bool) -> str:
    columns = ""
    for rank, records in ranks.items():
        cells = "".join(_extreme(record, part, rank) for record in records[:_SHOWN_EXTREMES])
        columns += f'<div class="column">{cells}</div>'
    title = f"{'Judge: ' if is_judge else ''}{escaped(part, 100)}"
    return folded(title, f'<div class="answers two">{columns}</div>')


def _extreme(record: dict[str, Any], part: str, rank: str) -> str:
    value = (record.get("parts") or {}).get(part)
    score = f" · score {score_text(record['score'])}" if record.get("score") is not None else ""
    return (
        f'<div class="answer"><p class="when"><span>{rank.capitalize()}{score}</span>'
        f'<b title="{escaped(part, 100)}">{score_text(value)}</b></p>'
        f'<p class="asked">{escaped(record["prompt"])}</p>{answer_text(record)}</div>'
    )
