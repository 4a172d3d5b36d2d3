"""The discriminator of sentence order: known features, made-up laws of order, and real reviews."""

import json
from itertools import pairwise

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.metrics.sentence_order import _GRID, _orders, _Table, train_order
from hybrid_jax.metrics.text import sentences
from hybrid_jax.rewards.coherence import Coherence

NAMES = ["apple", "bridge", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket"]


def chain(seed: int) -> str:
    """Each sentence takes up what the one before ended with."""
    order = np.random.default_rng(seed).permutation(NAMES)[:6]
    return " ".join(f"One {first} meets one {second}." for first, second in pairwise(order))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "chains.txt"
    path.write_text("\n".join(map(chain, range(60))))
    return path


def test_the_grid_counts_what_two_sentences_share_by_how_often_the_text_names_it():
    table = _Table(["The dog saw Ann in 1990.", "The dogs of Ann ate.", "A dog slept in 1985."])
    index, value = table._neighbours(0, 1)
    grid = np.zeros(_GRID)
    np.add.at(grid, index[:_GRID], value[:_GRID])
    # Four content words (dog, saw, ann, 1990) and three (dog, ann, ate); dog is named three times, Ann twice.
    expected = [1 / 12**0.5, 1 / 12**0.5, 0, 0, 1, 0, 1, 0]
    np.testing.assert_allclose(grid, expected)
    assert table._neighbours(0, 2)[1][5] == -1  # a year before
    assert table._neighbours(2, 0)[1][5] == 1


def test_a_law_of_order_is_learnt_and_the_same_sentence_again_is_chance(texts):
    score = lambda text: Coherence(texts)([""], [text])[0]  # noqa: E731
    right = 0
    for seed in range(100, 110):
        true, (order, *_) = chain(seed), _orders(5, 1, seed)
        said = true.split(". ")
        said = [sentence.rstrip(".") + "." for sentence in said]
        right += score(true) > score(" ".join(said[i] for i in order))
    assert right == 10
    assert score(chain(200)) > 0.7
    repeated = " ".join([chain(3).split(". ")[0] + "."] * 5)
    assert score(repeated) == 0.5
    assert score("One apple meets one bridge.") == 0.5
    assert score("") == 0.5


def test_a_file_without_two_sentences_in_a_text_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n")
    with pytest.raises(UserError, match=r"a.txt has nothing to learn an order from: no text has two sentences"):
        Coherence(tmp_path / "a.txt")([""], ["One. Two."])


@pytest.mark.slow
def test_the_true_order_of_unseen_reviews_is_told_from_permutations(shared_data):
    """Film reviews (IMDB), 25 permutations of each."""
    read = lambda name: [  # noqa: E731
        json.loads(line)["text"]
        for line in (shared_data / f"imdb/{name}.jsonl").read_text().strip().split("\n")
    ]
    model = train_order(read("train"), 10)
    right, probabilities = [], []
    for number, text in enumerate(read("test")):
        table = _Table(sentences(text)[:40])
        if (size := len(table._said)) < 3:
            continue
        own = model._score(table, range(size))
        right += [own > model._score(table, order) for order in _orders(size, 25, 10**6 + number)]
        probabilities.append(model.order_probability(text))
    assert np.mean(right) > 0.75
    assert np.mean(probabilities) > 0.6
