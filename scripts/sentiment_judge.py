"""NB-SVM as a judge within a config: ``{name: "sentiment_judge:NaiveBayesSvm", train: FILE}``.

``PYTHONPATH`` must hold this folder.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass

from nbsvm import Scorer, fit


@dataclass(frozen=True)
class NaiveBayesSvm:
    """1 where it finds prompt and response together positive, else 0."""

    train: str  # of reviews {"text", "label"}, gzip

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        decisions = _judge(self.train)([p + r for p, r in zip(prompts, responses, strict=True)])
        return (decisions > 0).astype(float).tolist()


@functools.cache
def _judge(path: str) -> Scorer:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return fit([row["text"].replace("<br />", "\n") for row in rows], [row["label"] for row in rows])
