"""Shows a run at the terminal: by a bar, or by a plain line now and then where stderr is not a terminal."""

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

from hybrid_jax.training.loggers import phase_label, without_extremes
from hybrid_jax.training.time_left import EVALUATION, TimeLeft

# Labels in the order in which they are shown, each with the metrics of a phase that it may stand for.
_SHOWN = {
    "loss": ("loss", "policy_loss"),
    "score": ("score",),
    "KL": ("kl",),
    "tokens/s": ("tokens_per_second",),
}
_KEPT = ("score", "kl")  # shown during the steps of other phases too, which log none of their own


class Progress:
    """Shows phase, loss, score, KL, tokens per second and the time left, on ``stream`` (stderr).

    Args:
        total: the number of updates of the whole run.
        initial: the number already done when this process resumed.
        line_seconds: seconds between two lines where the stream is not a terminal.
        time_left: estimates the time left from the plan of the run.
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
        self._of_any_phase: dict[str, Any] = {}  # metric without its phase -> the newest value
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
        """Shows a metrics record; an evaluation changes the numbers but does not count as a step."""
        self._latest |= record
        if record["phase"] == EVALUATION:
            return
        self._of_any_phase |= {name.partition("/")[2]: value for name, value in record.items()}
        finished, self._done = record["step"] + 1 - self._done, record["step"] + 1
        self._bar.set_description_str(_label(record), refresh=False)
        shown = [text for text in (self._left(), self._numbers(record["phase"])) if text]
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(finished)
        due = self._last_line is None or time.monotonic() - self._last_line >= self._line_seconds
        if not self._is_terminal and (due or self._done == self._total):
            self._write_line(record)

    def samples(self, records: list[dict[str, Any]], limit: int = 4) -> None:
        """Prints the first samples as a table, above the bar."""
        width = shutil.get_terminal_size().columns if self._is_terminal else 120
        if shown := without_extremes(records)[:limit]:
            self._write(sample_table(shown, width))

    def busy(self, what: str) -> None:
        """Shows on the bar what the run is doing before its next step."""
        self._bar.set_description_str(what)

    def close(self) -> None:
        """Ends the bar."""
        self._open.close()
        self._bar.close()

    def _numbers(self, phase: str) -> str:
        shown = []
        for label, names in _SHOWN.items():
            values = (self._value(phase, name) for name in names)
            value = next((value for value in values if value is not None), None)
            if value is not None:
                shown.append(f"{label} {value:,.0f}" if label == "tokens/s" else f"{label} {value:.3f}")
        return ", ".join(shown)

    def _value(self, phase: str, name: str) -> Any:
        own = self._latest.get(f"{phase}/{name}")
        if own is not None or name not in _KEPT:
            return own
        return self._of_any_phase.get(name, self._latest.get(f"{EVALUATION}/{name}"))

    def _write_line(self, record: dict[str, Any]) -> None:
        self._last_line = time.monotonic()
        shown = [
            f"step {self._done}/{self._total}",
            _label(record),
            self._numbers(record["phase"]),
            self._left(),
        ]
        self._write("  ".join(text for text in shown if text))

    def _left(self) -> str:
        """Writes ``01:30 left``, with ``about`` while a phase has never run; nothing before the first."""
        seconds = self.time_left.seconds(self._total - self._done)
        if seconds is None:
            return ""
        about = "about " if self.time_left.is_guess else ""
        return f"{about}{tqdm.format_interval(round(seconds))} left"

    def _write(self, text: str) -> None:
        try:
            self._bar.write(text, file=self._stream)
            self._stream.flush()
        except OSError:  # a full disk or a closed pipe is no reason to lose a run
            self._stream = io.StringIO()


def _label(record: dict[str, Any]) -> str:
    return phase_label(record["phase"], record.get("kind"))


def sample_table(records: list[dict[str, Any]], width: int) -> str:
    """Lays out prompt, response and score in columns, no line wider than ``width`` cells of a terminal."""
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
    """Puts a text on one line of exactly ``width`` cells, without characters that could steer a terminal."""
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
