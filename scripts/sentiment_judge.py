"""NB-SVM as a judge or a reward within a config: ``{name: "sentiment_judge:NaiveBayesSvm", train: FILE}``.

``PYTHONPATH`` must hold this folder.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nbsvm import Scorer, fit

Half = Literal["first", "second"]


@dataclass(frozen=True)
class NaiveBayesSvm:
    """The opinion of NB-SVM on prompt and response together: how positive they are."""

    train: str  # of reviews {"text", "label"}, gzip
    half: Half | None = None  # learns from this half of the reviews of each label; null is all
    output: Literal["label", "decision", "probability"] = "label"  # 1 or 0; the margin d; 1 / (1 + exp(-d))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        decisions = _judge(self.train, self.half)([p + r for p, r in zip(prompts, responses, strict=True)])
        if self.output == "decision":
            return decisions.tolist()
        if self.output == "probability":
            return (1 / (1 + np.exp(-decisions))).tolist()
        return (decisions > 0).astype(float).tolist()


def half_of(rows: Sequence[dict], half: Half | None) -> list[dict]:
    """The first or the second half of the rows of each label, in order: reviews of a film stand together."""
    chosen = []
    for label in (0, 1):
        of_label = [row for row in rows if int(row["label"]) == label]
        middle = len(of_label) // 2
        chosen += {None: of_label, "first": of_label[:middle], "second": of_label[middle:]}[half]
    return chosen


@functools.cache
def _judge(path: str, half: Half | None) -> Scorer:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = half_of([json.loads(line) for line in lines], half)
    return fit([row["text"].replace("<br />", "\n") for row in rows], [int(row["label"]) for row in rows])
