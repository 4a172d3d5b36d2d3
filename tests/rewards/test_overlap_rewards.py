import time

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.overlap import Bleu, Chrf, EditSimilarity, ExactMatch, Rouge, Ter, TokenF1

REWARDS = [Bleu(), Chrf(), Ter(), Rouge(), ExactMatch(), TokenF1(), EditSimilarity()]
RESPONSES = ["the cat sat on the mat", "No.", ""]
REFERENCES = [["a dog", "the cat is on the mat"], "no", ["x y"]]


def score(reward, responses, references):
    return reward([""] * len(responses), responses, references=references)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (Bleu(), [0.37991784, None, 0.0]),
        (Ter(), [-1 / 4, -1.0, -1.0]),  # 1 edit, 4 words of the mean reference; case is ignored, marks are not
        (Rouge(variant="rouge1"), [5 / 6, 1.0, 0.0]),
        (Rouge(variant="rouge2", measure="recall"), [3 / 5, 0.0, 0.0]),
        (ExactMatch(), [0.0, 1.0, 0.0]),
        (TokenF1(), [3 / 4, 1.0, 0.0]),  # cat, on, mat of 4 and 4 words without articles
        (EditSimilarity(), [1 - 3 / 22, 1 / 3, 0.0]),  # 3 edits between sat and is
    ],
)
def test_each_reward_has_the_value_of_its_measure_for_the_best_reference(reward, expected):
    for value, known in zip(score(reward, RESPONSES, REFERENCES), expected, strict=True):
        assert known is None or value == pytest.approx(known, abs=1e-7)


def test_settings_reach_the_measure():
    assert score(Bleu(lowercase=True), ["A DOG BIT ME"], ["a dog bit me"]) == pytest.approx([1.0])
    assert score(Bleu(max_order=1, tokens="none"), ["me."], ["me ."]) == [0.0]
    assert score(Bleu(smoothing="floor"), RESPONSES[:1], REFERENCES[:1]) == pytest.approx([0.25406637])
    plus_plus, plain = (score(Chrf(word_order=n), ["a bc"], ["ab c"])[0] for n in (2, 0))
    assert plus_plus < plain == pytest.approx(1.0)
    assert score(ExactMatch(normalise=False), ["A"], ["a"]) == [0.0]
    assert score(Rouge(stemmer=False), ["dogs"], ["dog"]) == [0.0]
    assert score(Ter(max_words=1), ["c d a b"], ["a b c d"]) == [-1.0]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
def test_a_further_reference_that_is_worse_or_a_copy_changes_what_it_should(reward):
    (copy,) = score(
        reward, ["The Eagle serves food."], [["The Eagle serves food.", "Nothing of the kind is it."]]
    )
    assert copy == pytest.approx(0.0 if isinstance(reward, Ter) else 1.0)


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
@pytest.mark.parametrize("missing", [None, [], ["a", None], 3, [3]])
def test_a_row_without_references_is_one_line_that_names_the_row(reward, missing):
    with pytest.raises(UserError, match=r"row 1.*column 'references' must hold a list of texts") as caught:
        evaluate_reward("part", reward, ["", ""], ["a", "b"], {"references": [["a"], missing]})
    assert "\n" not in str(caught.value)


def test_data_without_the_column_is_one_line():
    with pytest.raises(UserError, match="reward 'part' needs the column 'references'"):
        evaluate_reward("part", Bleu(), [""], ["a"], {"reference": [["a"]]})


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
def test_hostile_texts_are_scored_within_seconds(reward):
    responses = ["", "\x00\ufeff", "你好，世界。", "🙂🙂👍🏽", "a" * 100_000, "word, " * 16_667, "\n" * 100_000]
    start = time.monotonic()
    scores = evaluate_reward("part", reward, responses, responses, {"references": [["🙂", "a word, ok"]] * 7})
    assert time.monotonic() - start < 10  # 1.2 s for the slowest, measured alone
    assert scores.max() <= 1.0


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (Bleu, {"max_order": 0}, r"max_order must be in \[1, 20\], got 0"),
        (Bleu, {"tokens": "words"}, "tokens must be one of 13a, intl, char, zh, none, got 'words'"),
        (Bleu, {"smoothing": "add"}, "smoothing must be one of exp, floor, add-k, none, got 'add'"),
        (Chrf, {"char_order": 0}, r"char_order must be in \[1, 20\], got 0"),
        (Chrf, {"word_order": -1}, r"word_order must be in \[0, 20\], got -1"),
        (Chrf, {"beta": 0}, "beta must be above 0, got 0"),
        (Ter, {"max_words": -1}, "max_words must be at least 0, got -1"),
        (Rouge, {"max_words": 0}, "max_words must be at least 1, got 0"),
        (
            Rouge,
            {"variant": "rouge3"},
            "variant must be one of rouge1, rouge2, rougeL, rougeLsum, got 'rouge3'",
        ),
        (Rouge, {"measure": "f"}, "measure must be one of f1, recall, precision, got 'f'"),
    ],
)
def test_impossible_settings_are_refused(reward, settings, said):
    with pytest.raises(UserError, match=said):
        parse(reward, settings)


def test_a_package_that_is_absent_is_named_with_its_extra(monkeypatch):
    from hybrid_jax.metrics import overlap

    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    overlap._rouge.cache_clear()
    with pytest.raises(UserError, match=r"ROUGE needs rouge_score.*pip install -e '\.\[rewards\]'"):
        score(Rouge(), ["a"], [["a"]])
