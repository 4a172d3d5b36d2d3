"""Shows whole conversations as bubbles, with the reward of every turn, before and after training."""

from __future__ import annotations

from typing import Any

from hybrid_jax.reports.page import escaped, section
from hybrid_jax.reports.run import Run
from hybrid_jax.reports.samples import score_text

_MOST = 4  # conversations of a phase, each at the first and the last evaluation
_LETTERS = 2000  # of a message
_ENDS = {"truncated": "broken off", "failed": "its environment failed"}


def conversations_section(run: Run) -> str:
    """The first held-out conversations of each phase, side by side at the first and the last evaluation."""
    by_talk: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for record in run.conversations:
        by_talk.setdefault((str(record["of"]), record["index"]), {})[record["step"]] = record
    if not by_talk:
        return ""
    cards = "".join(_card(records) for (_, index), records in sorted(by_talk.items()) if index < _MOST)
    note = "<p>the same held-out environments each time; beside every answer its reward</p>"
    return section("Conversations", cards, note)


def _card(records: dict[int, dict[str, Any]]) -> str:
    first, last = min(records), max(records)
    moments = {first: "Before", last: "After"} if last > first else {first: "Conversation"}
    cells = "".join(_talk(records[step], label) for step, label in moments.items())
    return f'<article class="sample"><div class="answers two">{cells}</div></article>'


def _talk(record: dict[str, Any], label: str) -> str:
    bubbles = "".join(_bubble(message) for message in record["conversation"] if isinstance(message, dict))
    end = _ENDS.get(record.get("end", ""), "")
    closing = f'<p class="parts">{end}</p>' if end else ""
    return (
        f'<div class="answer"><p class="when"><span>{label} · step {record["step"]:,}</span>'
        f'<b title="return">{score_text(record.get("score"))}</b></p><div class="talk">{bubbles}</div>'
        f"{closing}</div>"
    )


def _bubble(message: dict[str, Any]) -> str:
    text, role = str(message.get("content", ""))[:_LETTERS], str(message.get("role", ""))
    own = role == "assistant"
    shown = escaped(text) if text.strip() else "<i>empty</i>"
    reward = f"<small>{score_text(message['reward'])}</small>" if message.get("reward") is not None else ""
    who = "" if role in ("assistant", "user") else f'<small class="role">{escaped(role)}</small>'
    return f'<p class="bubble{" own" if own else ""}">{who}{shown}{reward}</p>'
