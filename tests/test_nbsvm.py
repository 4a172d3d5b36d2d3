"""The judge that shares no code with our models: by hand, and on IMDB as published."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

SPEC = importlib.util.spec_from_file_location("nbsvm", Path(__file__).parents[1] / "scripts" / "nbsvm.py")
nbsvm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(nbsvm)

TEXTS = ["good film", "good good plot", "bad film", "dull plot"]
LABELS = [1, 1, 0, 0]


def test_naive_bayes_by_hand():
    # texts with the word + 1: positive bad 1 dull 1 film 2 good 3 plot 2 = 9; negative bad 2 dull 2 film 2
    # good 1 plot 2 = 9; so good has log 3, bad and dull log 1/2, film and plot 0
    score = nbsvm.fit_naive_bayes(TEXTS, LABELS, ngram_range=(1, 1))
    expected = [math.log(3), -math.log(2), 0.0, math.log(3) - math.log(2), 0.0]
    np.testing.assert_allclose(
        score(["good", "bad", "film", "good dull good", "unknown"]), expected, atol=1e-12
    )


def test_without_the_svm_every_ngram_weighs_the_same():
    naive = nbsvm.fit_naive_bayes(TEXTS, LABELS)(TEXTS)
    mixed = nbsvm.fit(TEXTS, LABELS, beta=0.0)(TEXTS)
    np.testing.assert_allclose(mixed / naive, mixed[0] / naive[0])
    assert mixed[0] / naive[0] > 0


def test_the_judge_tells_the_sides_apart_and_turning_the_labels_turns_it():
    score = nbsvm.fit(TEXTS, LABELS)(TEXTS)
    assert (score > 0).tolist() == [True, True, False, False]
    turned = nbsvm.fit(TEXTS, [1 - label for label in LABELS], beta=1.0)(TEXTS)
    np.testing.assert_allclose(turned, -nbsvm.fit(TEXTS, LABELS, beta=1.0)(TEXTS), atol=1e-4)  # the solver's


@pytest.mark.slow
def test_imdb_is_judged_as_published(shared_data):
    """Wang & Manning 2012: NB-SVM with bigrams 91.22, multinomial naive Bayes with bigrams 86.59.

    With single words naive Bayes gets 83.55 there; 82.88 in a reproduction with other words than theirs.
    """
    folder = shared_data / "imdb_full"
    if not folder.is_dir():
        pytest.skip("no full IMDB")
    train, test = (nbsvm.read(folder / f"{name}.jsonl.gz") for name in ("train", "test"))
    for texts, labels in (train, test):
        assert (len(texts), sum(labels)) == (25_000, 12_500)
    assert 100 * nbsvm.accuracy(nbsvm.fit(*train), *test) == pytest.approx(91.1, abs=0.4)
    assert 100 * nbsvm.accuracy(nbsvm.fit_naive_bayes(*train), *test) == pytest.approx(86.59, abs=0.4)
    words = nbsvm.fit_naive_bayes(*train, ngram_range=(1, 1))
    assert 100 * nbsvm.accuracy(words, *test) == pytest.approx(82.88, abs=0.1)
