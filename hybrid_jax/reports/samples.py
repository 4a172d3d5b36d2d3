"""Shows what the model answered to the same prompts before and after training."""

from __future__ import annotations

from typing import Any

from hybrid_jax.reports.charts import short_number
from hybrid_jax.reports.page import escaped, section
from hybrid_jax.reports.run import Run
from hybrid_jax.training.loggers import SAMPLES_FILE

_MAX_PROMPTS = 8


def samples_section(run: Run) -> str:
    """Shows the answers to each prompt side by side, without those that were picked for their scores."""
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
    return section("Samples", cards, note)


def _moments(run: Run, steps: list[int]) -> dict[int, str]:
    """Picks up to three steps: the first, the last before any reward (else the middle one) and the last."""
    if not steps:
        return {}
    first, last = steps[0], steps[-1]
    moments = {first: "Before", last: "After"} if last > first else {first: "Samples"}
    begin = run.first_reward_step
    before = [step for step in steps if begin is not None and step <= begin]
    if before and first < before[-1] < last:
        moments[before[-1]] = f"{escaped(run.before_reward)} only"
    elif len(steps) > 2:
        middle = min(steps[1:-1], key=lambda step: abs(step - (first + last) / 2))
        moments[middle] = "During"
    return dict(sorted(moments.items()))


def _card(answers: dict[int, dict[str, Any]], moments: dict[int, str]) -> str:
    cells = "".join(_answer(answers[step], label) for step, label in moments.items() if step in answers)
    prompt = next(iter(answers.values()))["prompt"]
    title = f'<p class="prompt">{escaped(prompt)}</p>'
    return f'<article class="sample">{title}<div class="answers">{cells}</div></article>'


def _answer(record: dict[str, Any], label: str) -> str:
    parts = (record.get("parts") or {}).items()
    values = " · ".join(f"{escaped(name)} {score_text(value)}" for name, value in parts)
    return (
        f'<div class="answer"><p class="when"><span>{label} · step {record["step"]:,}</span>'
        f'<b title="score">{score_text(record.get("score"))}</b></p>{answer_text(record)}'
        f'<p class="parts">{values}</p></div>'
    )


def answer_text(record: dict[str, Any]) -> str:
    """The answer of a sample as HTML; an empty one is named."""
    response = escaped(record["response"])
    if not response.strip():
        return '<p class="text empty">empty response</p>'
    return f'<p class="text">{response}</p>'


def score_text(value: float | None) -> str:
    """Writes a score with two decimals, a large one with three digits."""
    return f"{round(value, 2) + 0.0:.2f}" if value is not None and abs(value) < 100 else short_number(value)
