"""NB-SVM (Wang & Manning 2012): a linear bigram classifier that shares no code with our models, as a judge.

    r = log( (α + Σ_{y=1} f) / |·|₁ ) − log( (α + Σ_{y=0} f) / |·|₁ )        f: which n-grams a text has
    score(text) = (f ∘ r) · w' + b,   w' = (1 − β) · mean|w| + β · w          a linear SVM on f ∘ r

`fit` is what other programs call; the command prints accuracies on the 50,000 reviews of IMDB:

    python scripts/nbsvm.py ../shared/data/imdb_full
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = r"\b\w+\b"
Scorer = Callable[[Sequence[str]], np.ndarray]


def fit(
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    alpha: float = 1.0,
    C: float = 0.1,
    beta: float = 0.25,
    ngram_range: tuple[int, int] = (1, 2),
    seed: int = 0,
) -> Scorer:
    """A judge of texts: what it returns is float64 [B], above 0 for label 1.

    Args:
        texts: to learn from; letters are lower-cased.
        labels: 0 or 1.
        alpha: α, added to every count.
        C: of the SVM with the squared hinge loss.
        beta: β, between naive Bayes (0) and the SVM (1).
        ngram_range: lengths of the n-grams.
        seed: of the solver.
    """
    from sklearn.svm import LinearSVC

    vectorizer, features, ratio = _naive_bayes(texts, labels, alpha, ngram_range)
    svm = LinearSVC(C=C, random_state=seed).fit(_scaled(features, ratio), np.asarray(labels))
    weights = svm.coef_[0]
    weights = (1 - beta) * np.abs(weights).mean() + beta * weights

    def score(texts: Sequence[str]) -> np.ndarray:
        return vectorizer.transform(texts) @ (ratio * weights) + beta * svm.intercept_[0]

    return score


def fit_naive_bayes(
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    alpha: float = 1.0,
    ngram_range: tuple[int, int] = (1, 2),
) -> Scorer:
    """Multinomial naive Bayes on which n-grams a text has: f · r + log(N₁ / N₀)."""
    vectorizer, _, ratio = _naive_bayes(texts, labels, alpha, ngram_range)
    share = float(np.mean(labels))
    return lambda texts: vectorizer.transform(texts) @ ratio + np.log(share / (1 - share))


def _naive_bayes(
    texts: Sequence[str], labels: Sequence[int], alpha: float, ngram_range: tuple[int, int]
) -> tuple[Any, Any, np.ndarray]:
    """The function that makes features of texts, the features of these texts, and the log-count ratio r."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=WORDS, ngram_range=ngram_range, binary=True, dtype=np.float64)
    features: Any = vectorizer.fit_transform(texts)
    positive = np.asarray(labels) == 1
    counts = [alpha + np.asarray(features[rows].sum(axis=0)).ravel() for rows in (positive, ~positive)]
    p, q = (count / count.sum() for count in counts)
    return vectorizer, features, np.log(p) - np.log(q)


def _scaled(features: Any, ratio: np.ndarray) -> Any:
    """f ∘ r."""
    scaled = features.copy()
    scaled.data *= ratio[scaled.indices]
    return scaled


def accuracy(score: Scorer, texts: Sequence[str], labels: Sequence[int]) -> float:
    return float(np.mean((score(texts) > 0) == (np.asarray(labels) == 1)))


def read(path: Path) -> tuple[list[str], list[int]]:
    """Texts, with spaces for line breaks, and labels of a JSON-lines file, gzip where it ends in .gz."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return [row["text"].replace("<br />", " ") for row in rows], [int(row["label"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train.jsonl.gz and test.jsonl.gz")
    folder = parser.parse_args().folder
    train, test = read(folder / "train.jsonl.gz"), read(folder / "test.jsonl.gz")
    print(f"multinomial naive Bayes, bigrams  {100 * accuracy(fit_naive_bayes(*train), *test):.2f}")
    print(f"NB-SVM, bigrams                   {100 * accuracy(fit(*train), *test):.2f}")


if __name__ == "__main__":
    main()
