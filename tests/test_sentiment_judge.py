"""NB-SVM as a reward: each half learns from its own reviews, and the outputs are functions of one margin."""

import gzip
import json
import math

import pytest

ROWS = [
    *({"text": text, "label": 0} for text in ("bad film", "dull plot", "awful film", "boring plot")),
    *({"text": text, "label": 1} for text in ("good film", "fine plot", "great film", "lovely plot")),
]
PROMPTS, RESPONSES = ["a good", "an awful", "a lovely"], [" film", " film", " plot"]


@pytest.fixture
def judge(scripts, tmp_path):
    """Makes judges of the rows."""
    module = scripts("sentiment_judge")
    path = tmp_path / "reviews.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return lambda **settings: module.NaiveBayesSvm(str(path), **settings)


def test_a_half_knows_the_words_of_its_own_reviews_alone(judge):
    # "good" and "bad" stand in the first halves of both labels, "awful" and "lovely" in the second
    first, second = (judge(half=half, output="decision") for half in ("first", "second"))
    nothing_known = first([""], [""])[0], second([""], [""])[0]
    assert first(["good", "bad"], ["", ""])[0] > nothing_known[0] > first(["good", "bad"], ["", ""])[1]
    assert first(["awful", "lovely"], ["", ""]) == [nothing_known[0]] * 2
    assert second(["good", "bad"], ["", ""]) == [nothing_known[1]] * 2
    assert second(["lovely"], [""])[0] > nothing_known[1] > second(["awful"], [""])[0]


def test_label_and_probability_are_those_of_the_margin(judge):
    margins = judge(output="decision")(PROMPTS, RESPONSES)
    assert margins[0] > 0 > margins[1]
    assert judge()(PROMPTS, RESPONSES) == [1.0, 0.0, 1.0]
    expected = [1 / (1 + math.exp(-margin)) for margin in margins]
    assert judge(output="probability")(PROMPTS, RESPONSES) == pytest.approx(expected, abs=1e-15)
