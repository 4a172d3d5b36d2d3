"""What a person at the terminal sees: a bar, or a plain line now and then where stderr is no terminal."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
import unicodedata
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hybrid_jax.training.loggers import without_extremes
from hybrid_jax.training.time_left import TimeLeft

# Shown in this order, the first name that the latest records hold.
_SHOWN = {
    "loss": ("{phase}/loss", "ppo/policy_loss"),
    "score": ("ppo/score", "evaluation/score"),
    "KL": ("ppo/kl",),
    "tokens/s": ("{phase}/tokens_per_second",),
}


class Progress:
    """Phase, loss, score, KL, tokens per second and time left, on ``stream`` (stderr).

    Args:
        total: the number of updates of the whole run.
        initial: the number already done when this process resumed.
        line_seconds: how often a line is written when the stream is no terminal.
        time_left: estimates the time left; its plan is what the run has before it.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        stream: TextIO | None = None,
        line_seconds: float = 30.0,
        time_left: TimeLeft | None = None,
    ):
        self._stream = stream or sys.stderr or io.StringIO()  # None where it was closed
        self._is_terminal = self._stream.isatty()
        self._total, self._done = total, initial
        self._line_seconds = line_seconds
        self.time_left = time_left or TimeLeft()
        self._last_line: float | None = None
        self._latest: dict[str, Any] = {}
        self._bar = tqdm(
            total=total,
            initial=initial,
            file=self._stream,
            disable=not self._is_terminal,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._open = contextlib.ExitStack()
        if self._is_terminal:  # what is logged meanwhile stands above the bar, not in it
            self._open.enter_context(logging_redirect_tqdm())

    def update(self, record: dict[str, Any]) -> None:
        """Takes a metrics record; an evaluation changes the numbers but finishes no update."""
        self._latest |= record
        if record["phase"] == "evaluation":
            return
        finished, self._done = record["step"] + 1 - self._done, record["step"] + 1
        self._bar.set_description_str(record["phase"], refresh=False)
        shown = [text for text in (self._left(), self._numbers(record["phase"])) if text]
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(finished)
        due = self._last_line is None or time.monotonic() - self._last_line >= self._line_seconds
        if not self._is_terminal and (due or self._done == self._total):
            self._write_line(record["phase"])

    def samples(self, records: list[dict[str, Any]], limit: int = 4) -> None:
        """Prints the first samples as a table, above the bar."""
        width = shutil.get_terminal_size().columns if self._is_terminal else 120
        if shown := without_extremes(records)[:limit]:
            self._write(sample_table(shown, width))

    def busy(self, what: str) -> None:
        """Says on the bar what keeps the run from its next step."""
        self._bar.set_description_str(what)

    def close(self) -> None:
        self._open.close()
        self._bar.close()

    def _numbers(self, phase: str) -> str:
        shown = []
        for label, names in _SHOWN.items():
            values = (self._latest.get(name.format(phase=phase)) for name in names)
            value = next((value for value in values if value is not None), None)
            if value is not None:
                shown.append(f"{label} {value:,.0f}" if label == "tokens/s" else f"{label} {value:.3f}")
        return ", ".join(shown)

    def _write_line(self, phase: str) -> None:
        self._last_line = time.monotonic()
        shown = [f"step {self._done}/{self._total}", phase, self._numbers(phase), self._left()]
        self._write("  ".join(text for text in shown if text))

    def _left(self) -> str:
        """``01:30 left``; ``about 01:30 left`` while a phase to come has never run; nothing before any has."""
        seconds = self.time_left.seconds(self._total - self._done)
        if seconds is None:
            return ""
        about = "about " if self.time_left.is_guess else ""
        return f"{about}{tqdm.format_interval(round(seconds))} left"

    def _write(self, text: str) -> None:
        try:
            self._bar.write(text, file=self._stream)
            self._stream.flush()
        except OSError:  # a full disk or a reader that left: no reason to lose a run
            self._stream = io.StringIO()


def sample_table(records: list[dict[str, Any]], width: int) -> str:
    """Prompt, response and score in columns, cut so that no line is wider than ``width`` terminal cells."""
    score_width = 8
    prompt_width = max((width - score_width - 4) * 2 // 5, 6)
    response_width = max(width - score_width - 4 - prompt_width, 6)
    rows = [("prompt", "response", "score")]
    rows += [(record["prompt"], record["response"], _score(record["score"])) for record in records]
    return "\n".join(
        f"{_fit(prompt, prompt_width)}  {_fit(response, response_width)}  {score:>{score_width}}"
        for prompt, response, score in rows
    )


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"  # None without a reward


def _fit(text: str, width: int) -> str:
    """``text`` on one line in exactly ``width`` cells; nothing that could steer a terminal survives."""
    one_line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    if _cells(one_line) > width:
        while _cells(one_line) > width - 1:
            one_line = one_line[: min(len(one_line) - 1, width)]
        one_line += "…"
    return one_line + " " * (width - _cells(one_line))


def _cells(text: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )
