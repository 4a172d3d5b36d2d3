import gzip
import itertools
import json

import numpy as np
import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.corpora import restaurants
from hybrid_jax.rewards.base import columns_of, evaluate_reward
from hybrid_jax.rewards.style import Formality, Readability
from hybrid_jax.rewards.text import Distinct, FactCoverage, Length, LexiconSentiment, Repetition, mentions

FACTS = {"name": ["the eagle"], "price": ["cheap", "low-priced"], "area": ["by the river"]}


def cover(response, facts=FACTS, **settings):
    return FactCoverage(**settings)([""], [response], facts=[facts])[0]


def test_fact_coverage_is_the_share_of_facts_stated():
    assert cover("The Eagle is a CHEAP place by  the\nriver.") == 1.0
    assert cover("The Eagle is low-priced.") == pytest.approx(2 / 3)
    assert cover("Luna is cheap, cheap, cheap.") == pytest.approx(1 / 3)
    assert cover("") == 0.0


def test_fact_coverage_counts_whole_words_only():
    assert cover("the eagles are cheaper by the rivers") == 0.0
    assert not mentions("pubs", ["pub"])
    assert mentions("a pub.", ["pub"])
    assert mentions("from £20-25 on", ["£20-25"])  # a phrase may begin with a sign
    assert not mentions("anything", [])


def test_a_part_of_a_fact_counts_where_that_is_asked_for_unless_another_fact_is_said():
    fact, others = {"code": ["the blue north gate", "gate seven"]}, {"code": ["red south gate"]}
    said = [
        "It was the blue north gate.",
        "Blue, a gate, the gate.",
        "Gate seven!",
        "blue; the red south gate",
        "",
    ]
    rows = {"facts": [fact] * 5, "contradictions": [others] * 5}
    assert FactCoverage(soft=True)([""] * 5, said, **rows) == [1.0, 0.75, 1.0, 0.0, 0.0]
    assert FactCoverage()([""] * 5, said, **rows) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_fact_coverage_reads_lists_of_facts_and_single_phrases():
    assert cover(
        "The Eagle is cheap.", facts=[["the eagle"], ["cheap"], ["italian", "pizza"]]
    ) == pytest.approx(2 / 3)
    assert cover("The Eagle is cheap.", facts={"name": "the eagle", "area": "by the river"}) == 0.5


def test_a_contradicted_fact_does_not_count():
    response = "The Eagle is cheap and pricey."
    facts, others = [{"name": ["the eagle"], "price": ["cheap"]}], [{"price": ["pricey"], "name": []}]
    assert FactCoverage()([""], [response], facts=facts, contradictions=others) == [0.5]
    assert FactCoverage(contradiction_penalty=0.5)([""], [response], facts=facts, contradictions=others) == [
        0.75
    ]
    assert FactCoverage(contradiction_penalty=0.0)([""], [response], facts=facts, contradictions=others) == [
        1.0
    ]
    wrong_only = FactCoverage()([""], ["The Eagle is pricey."], facts=facts, contradictions=others)
    assert wrong_only == [0.5]  # a wrong value is a missing one, not a negative one


@pytest.mark.parametrize("facts", [None, {}, [], {"price": []}])
def test_a_row_without_facts_is_an_error_of_the_data(facts):
    with pytest.raises(UserError, match="reward 'facts' raised a row has no facts"):
        evaluate_reward("facts", FactCoverage(), [""], [""], {"facts": [facts]})


def test_the_embedded_held_out_reviews_cover_all_their_facts_and_those_of_other_rows_do_not():
    examples = restaurants("held_out")
    reviews = [example.response for example in examples]
    scores = FactCoverage()([], reviews, **columns_of(examples))
    assert min(scores) == 1.0
    mixed = FactCoverage()([], reviews[1:] + reviews[:1], **columns_of(examples))
    assert sum(mixed) / len(mixed) < 0.35


def test_lexicon_sentiment_gives_vaders_published_values():
    texts = [
        "VADER is smart, handsome, and funny.",
        "VADER is VERY SMART, handsome, and FUNNY!!!",
        "VADER is not smart, handsome, nor funny.",
        "",
    ]
    assert LexiconSentiment()([""] * 4, texts) == pytest.approx([0.8316, 0.9342, -0.7424, 0.0], abs=1e-4)


def test_length_falls_linearly_on_both_sides_of_the_target():
    responses = ["one two three four", "one two", "one, two! three four five six", ""]
    assert Length(target=4)([], responses) == pytest.approx([0.0, -0.5, -0.5, -1.0])
    assert Length(target=4, scale=10)([], responses) == pytest.approx([0.0, -0.2, -0.2, -0.4])
    assert Length(target=4, tolerance=2)([], responses) == pytest.approx([0.0, 0.0, 0.0, -0.5])


def test_length_counts_characters_where_asked_to():
    assert Length(target=4, unit="characters")([], ["你好世界", "你好", ""]) == pytest.approx([0.0, -0.5, -1.0])
    with pytest.raises(UserError, match="target must be at least 1, got 0"):
        parse(Length, {"target": 0, "unit": "characters"})


def test_distinct_is_the_share_of_different_ngrams_of_each_response():
    assert Distinct()([], ["a b a b", "a b c", "a", ""]) == pytest.approx([2 / 3, 1.0, 0.0, 0.0])
    assert Distinct(n=1)([], ["a b a b"]) == [0.5]


def test_readability_is_the_distance_from_the_wanted_ease():
    text = "The cat sat on the mat. It was a sunny day, and everybody was happy."  # its ease is 92.0625
    assert Readability(target=92.0625)([], [text]) == pytest.approx([0.0])
    assert Readability(target=62.0625, scale=10)([], [text, ""]) == pytest.approx([-3.0, -6.20625])
    assert Readability(target=10)([], ["🙂"]) == pytest.approx([-3.0])  # no words: the end further away


def test_formality_ranks_an_official_notice_above_a_chat():
    notice, chat = "The submission of documents to the office is a requirement.", "Yeah, I just really love it!"
    formal, informal = Formality()([], [notice, chat])
    assert 0.0 <= informal < 0.3 < 0.8 < formal <= 1.0


def test_repetition_ranks_stuttering_below_a_sentence():
    stutter, sentence = Repetition()([], ["the the the the", "The Eagle is a cheap place by the river."])
    assert (stutter, sentence) == (pytest.approx(-2 / 3), 0.0)
    assert Repetition(n=1)([], ["a b a"]) == [pytest.approx(-1 / 3)]


@pytest.mark.slow
def test_a_lexicon_is_a_weak_judge_of_film_reviews(shared_data):
    """70.5 % of a thousand reviews of IMDB's test set, with an error of 1.4; counting n-grams gets 91."""
    path = shared_data / "imdb_full" / "test.jsonl.gz"
    if not path.is_file():
        pytest.skip("no full IMDB")
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 0, None, 25)]
    found = np.array(LexiconSentiment()([], [row["text"] for row in rows])) > 0
    positive = np.array([row["label"] == 1 for row in rows])
    assert (len(rows), positive.mean()) == (1000, 0.5)
    assert 100 * (found == positive).mean() == pytest.approx(70.5, abs=2.8)


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (Length, {"target": 0}, "target must be at least 1, got 0"),
        (Length, {"target": 3, "tolerance": -1}, "tolerance must be at least 0, got -1"),
        (Length, {"target": 3, "scale": 0}, "scale must be above 0, got 0"),
        (Distinct, {"n": 0}, "n must be at least 1, got 0"),
        (Readability, {"scale": 0}, "scale must be above 0, got 0"),
        (Readability, {"target": 300}, r"target must be in \[-1000, 206.835\], got 300"),
        (Repetition, {"n": 0}, "n must be at least 1, got 0"),
        (FactCoverage, {"contradiction_penalty": 2}, r"contradiction_penalty must be in \[0, 1\], got 2"),
    ],
)
def test_impossible_settings_are_refused(reward, settings, said):
    with pytest.raises(UserError, match=said):
        parse(reward, settings)
