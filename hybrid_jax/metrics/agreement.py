"""Agreement of annotators beyond chance, by NLTK's `AnnotationTask`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from hybrid_jax.metrics.packages import import_package

Label = str | int | float
Vote = tuple[str, str, Label]  # annotator, item, label


def agreement(votes: Sequence[Vote], level: Literal["nominal", "interval"] = "nominal") -> dict[str, float]:
    """Statistics of agreement; those that the votes do not allow are left out.

    Returns:
        ``observed``, the share of pairs of votes on one item that agree; ``cohen_kappa``, the mean over pairs
        of annotators of Cohen's κ on the items that both labelled (Cohen 1960); ``fleiss_kappa``, where every
        item has as many votes as any other (Fleiss 1971); ``krippendorff_alpha``, whatever is missing
        (Krippendorff 1980).

    Args:
        votes: annotator, item and label of each; nobody labels an item twice.
        level: of the labels, for Krippendorff's α: names, or numbers whose squared distance counts.
    """
    task_of = import_package("nltk.metrics.agreement", "agreement of annotators").AnnotationTask
    distance = import_package("nltk.metrics", "agreement of annotators")
    by_item: dict[str, dict[str, Label]] = defaultdict(dict)
    for annotator, item, label in votes:
        by_item[item][annotator] = label
    pairs = [a == b for labels in by_item.values() for a, b in combinations(labels.values(), 2)]
    if not pairs:
        return {}
    found: dict[str, float] = {"observed": float(np.mean(pairs))}
    if kappas := _cohen(by_item, task_of):
        found["cohen_kappa"] = float(np.mean(kappas))
    repeated = [
        (annotator, item, label)
        for item, labels in by_item.items()
        if len(labels) > 1
        for annotator, label in labels.items()
    ]
    if len({len(labels) for labels in by_item.values()}) == 1:
        # Fleiss' κ knows no annotators, so that any may take the part of any other.
        anonymous = [(str(i), item, x) for item, ls in by_item.items() for i, x in enumerate(ls.values())]
        found["fleiss_kappa"] = _value(task_of(data=anonymous).pi)
    distances = {"nominal": distance.binary_distance, "interval": distance.interval_distance}
    task: Any = task_of(data=repeated, distance=distances[level])
    found["krippendorff_alpha"] = _value(task.alpha)
    return found


def _cohen(by_item: dict[str, dict[str, Label]], task_of: Any) -> list[float]:
    annotators = sorted({annotator for labels in by_item.values() for annotator in labels})
    kappas = []
    for a, b in combinations(annotators, 2):
        both = [(i, labels[a], labels[b]) for i, labels in by_item.items() if a in labels and b in labels]
        if both:
            data = [vote for item, x, y in both for vote in ((a, item, x), (b, item, y))]
            kappas.append(_value(task_of(data=data).kappa))
    return kappas


def _value(statistic: Any) -> float:
    """1 where only one label was ever given, for which chance alone would agree."""
    try:
        return float(statistic())
    except ZeroDivisionError:
        return 1.0
