import json
import math
from itertools import chain

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import check_columns
from hybrid_jax.rewards.dialogue import Engagement, EntityOverlap, Relevance, entities
from hybrid_jax.rewards.similarity import CosineSimilarity
from hybrid_jax.testing import tiny_encoder_folder

TEXTS = ["the train leaves at noon", "the hotel is in the north", "a train to the north", "noon it is"]
PAIRS = [
    ("is there a train at noon", "the train leaves at noon and the train is blue"),
    ("a hotel in the north", "the weather is the weather"),
    ("a taxi, please", "a taxi, please"),
    ("a taxi", ""),
]


def test_relevance_is_the_cosine_of_tf_idf_as_scikit_learn_has_it(tmp_path):
    rows, lines = tmp_path / "texts.jsonl", tmp_path / "texts.txt"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    lines.write_text("\n".join(TEXTS))
    settings = {"sublinear_tf": True, "token_pattern": r"\w+"}
    names = sorted({word for text in (*TEXTS, *chain(*PAIRS)) for word in text.replace(",", "").split()})
    theirs = TfidfVectorizer(**settings, vocabulary=names).fit(TEXTS)
    asked, said = (theirs.transform(side).toarray() for side in zip(*PAIRS, strict=True))
    expected = (asked * said).sum(1)
    for path in (rows, lines):
        assert Relevance(path=path)(*zip(*PAIRS, strict=True)) == pytest.approx(expected, abs=1e-6)
    assert expected[2:] == pytest.approx([1, 0])


def test_without_a_file_all_words_count_alike():
    twice = 1 + math.log(2)
    (score,) = Relevance()(["blue blue train"], ["Train, green!"])
    assert score == pytest.approx(1 / (math.sqrt(twice**2 + 1) * math.sqrt(2)))
    assert Relevance()(["", "a"], ["a", "b"]) == [0, 0]


def test_what_is_enough_earns_one_and_an_echo_no_more():
    near, far = Relevance()(["a b c d", "a b c d"], ["a b x y", "a x y z"])
    assert (near, far) == (pytest.approx(0.5), pytest.approx(0.25))
    capped = Relevance(enough=0.4)(["a b c d"] * 3, ["a b x y", "a x y z", "a b c d"])
    assert capped == pytest.approx([1, 0.625, 1])


def test_with_an_encoder_it_is_the_similarity_to_the_prompt(tmp_path):
    folder = str(tiny_encoder_folder(tmp_path))
    asked, said = zip(*PAIRS, strict=True)
    expected = CosineSimilarity(folder, to="prompt")(asked, said)
    assert Relevance(encoder=folder)(asked, said) == expected
    assert Relevance(encoder=folder, enough=0.5)(asked, said) == [min(score, 0.5) / 0.5 for score in expected]
    with pytest.raises(ValueError, match="path weighs words and encoder reads texts without them"):
        Relevance(path=tmp_path / "a", encoder=folder)


def test_engagement_is_the_share_of_the_horizon_that_the_user_goes_on():
    scores = Engagement(horizon=4)(["a"] * 4, ["b"] * 4, turns_left=[0, 1, 4, 9])
    assert np.asarray(scores).tolist() == [0, 0.25, 1, 1]
    with pytest.raises(UserError, match="needs the column 'turns_left', which the data lacks"):
        check_columns("engagement", Engagement(), ["references"])


def test_entities_are_names_times_and_numbers():
    text = (
        "The train TR1234 to Cambridge leaves at 12:45 . It costs 10.10 pounds; I book 2 for Yu Garden at 5 PM?"
    )
    assert entities(text) == {
        "names": {"cambridge", "yu", "garden"},
        "times": {"12:45", "5pm"},
        "numbers": {"tr1234", "10", "2"},
    }


def test_entity_overlap_is_the_f1_of_what_both_name():
    reference = "It leaves Cambridge at 12:45 for 2 people ."  # three entities
    texts = ["At 12:45 .", "To Ely and Cambridge at 12:45 for 2 .", "Yes .", reference]
    assert EntityOverlap()(["x"] * 4, texts, [reference] * 4) == pytest.approx([1 / 2, 6 / 7, 0, 1])
    assert EntityOverlap(kinds=("times",))(["x"] * 2, texts[:2], [reference] * 2) == [1, 1]
    assert EntityOverlap()(["x"] * 2, ["Yes .", "At 9:15 ."], [["No ."], ["No .", "At 9:15 ."]]) == [1, 1]
