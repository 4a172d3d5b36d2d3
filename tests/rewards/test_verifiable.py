import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.coverage import ConceptCoverage, KeywordCoverage
from hybrid_jax.rewards.verifiable import FinalNumber


def score(reward, responses, **columns):
    return evaluate_reward("part", reward, [""] * len(responses), responses, columns).tolist()


def test_the_final_number_must_be_that_of_the_row():
    responses = ["so 3.\n#### $1,000", "It is 50%.", "I do not know.", "", "1/2", "a 4 or 5"]
    answers = ["1000.00", 0.5, 3, "7", ["#### 3", "0.5"], 4]
    assert score(FinalNumber(), responses, final_answer=answers) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert score(FinalNumber(column="n", marker=None), ["#### 1 or 2"], n=[2]) == [1.0]


@pytest.mark.parametrize("answer", [None, "none", True, [], [3, "x"]])
def test_a_row_without_an_answer_is_one_line_that_names_the_row(answer):
    with pytest.raises(UserError, match="row 1: column 'final_answer' must hold a number, got"):
        score(FinalNumber(), ["1", "1"], final_answer=[1, answer])


def test_a_wrong_column_name_suggests_the_nearest():
    with pytest.raises(UserError, match="no column 'final_answer'; did you mean 'final_anser'"):
        score(FinalNumber(), ["1"], final_anser=[1])
    with pytest.raises(UserError, match="no column 'concept'; did you mean 'concepts'"):
        score(ConceptCoverage(column="concept"), ["1"], concepts=[["a"]])


def test_coverage_is_of_the_concepts_of_the_row_or_of_the_keywords_of_the_config():
    texts = ["Two dogs catch a ball.", ""]
    assert score(ConceptCoverage(), texts, concepts=[["dog", "catching", "cat"], "cat"]) == pytest.approx(
        [2 / 3, 0]
    )
    assert score(KeywordCoverage(("balls", "park")), texts) == [0.5, 0.0]
    assert score(KeywordCoverage(("ball",), max_words=4), texts) == [0.0, 0.0]


@pytest.mark.parametrize("concepts", [None, [], ["!"], [3]])
def test_a_row_without_concepts_is_one_line_that_names_the_row(concepts):
    with pytest.raises(UserError, match=r"row 1.*concepts"):
        score(ConceptCoverage(), ["a", "b"], concepts=[["a"], concepts])


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (FinalNumber, {"marker": ""}, "marker must not be empty, got ''"),
        (KeywordCoverage, {"keywords": ["?"]}, r"keywords must hold at least one word, got \['\?'\]"),
        (KeywordCoverage, {"keywords": ["a"], "max_words": 0}, "max_words must be at least 1, got 0"),
        (ConceptCoverage, {"max_words": 0}, "max_words must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(reward, settings, said):
    with pytest.raises(UserError, match=said):
        parse(reward, settings)
