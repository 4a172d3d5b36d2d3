import hashlib
import itertools
import re

import pytest

from hybrid_jax.data import corpora
from hybrid_jax.data.corpora import NAMES, SLOTS, accepted_phrases, restaurants


def covered(example) -> list[bool]:
    text = example.response.lower()
    return [any(phrase in text for phrase in phrases) for phrases in example.columns["facts"].values()]


def contradicted(example) -> list[bool]:
    text = example.response.lower()
    return [any(phrase in text for phrase in phrases) for phrases in example.columns["contradictions"].values()]


@pytest.fixture(scope="module")
def complete():
    return restaurants("train", omission=0.0)


@pytest.fixture(scope="module")
def held_out():
    return restaurants("held_out")


def test_it_is_big_enough_and_all_pairs_are_distinct(complete, held_out):
    assert (len(complete), len(held_out)) == (6000, 400)
    assert len({example.prompt for example in [*complete, *held_out]}) == 6400


def test_held_out_facts_never_occur_in_training_in_any_order(complete, held_out):
    def facts(example):
        return frozenset(example.prompt.split(" | "))

    assert not {facts(e) for e in complete} & {facts(e) for e in held_out}
    other_seed = restaurants("train", seed=1, size=2000)
    assert not {facts(e) for e in other_seed} & {facts(e) for e in held_out}


def test_every_complete_review_covers_all_its_facts_and_contradicts_none(complete, held_out):
    for example in [*complete, *held_out]:
        assert all(covered(example)), (example.prompt, example.response)
        assert not any(contradicted(example)), (example.prompt, example.response)


def test_the_omission_share_of_reviews_leaves_one_or_two_facts_out_but_never_the_name():
    for omission in (0.25, 0.6):
        examples = restaurants("train", omission)
        missing = [covered(example).count(False) for example in examples]
        assert set(missing) == {0, 1, 2}
        share = sum(count > 0 for count in missing) / len(missing)
        assert share == pytest.approx(omission, abs=0.02)  # 3.5 standard errors of 6,000 draws
        assert all(covered(example)[0] for example in examples)
        assert all(covered(example).count(True) >= 2 for example in examples)


def test_no_phrase_of_one_value_accepts_another_value_of_any_slot():
    values = [("name", name) for name in NAMES] + [(s, v) for s in SLOTS for v in SLOTS[s]]
    said = {(slot, value): [value] if slot == "name" else SLOTS[slot][value] for slot, value in values}
    for first, second in itertools.permutations(values, 2):
        for phrase in said[first]:
            confused = [accepted for accepted in accepted_phrases(*second) if accepted in phrase.lower()]
            assert not confused, (first, phrase, second, confused)


def test_every_phrase_is_accepted_for_its_own_value_and_every_construction_has_four():
    for slot, values in SLOTS.items():
        for value, phrases in values.items():
            assert len(set(phrases)) >= 4
            for phrase in phrases:
                assert any(accepted in phrase.lower() for accepted in accepted_phrases(slot, value))
    for patterns in (
        corpora.DESCRIPTIONS,
        corpora.SERVINGS,
        corpora.PLACINGS,
        corpora.INVITATIONS,
        corpora.PLACES,
        corpora.SUBJECTS,
        corpora.SERVES,
        corpora.STANDS,
        corpora.MEALS,
    ):
        assert len(set(patterns)) >= 4


def test_the_facts_of_a_known_prompt_are_these():
    assert accepted_phrases("name", "The Eagle") == ["the eagle"]
    assert accepted_phrases("food", "Italian") == ["italian", "pizza and pasta"]
    assert accepted_phrases("price", "cheap") == ["cheap", "inexpensive", "low-priced", "affordable"]
    assert accepted_phrases("rating", "low") == [
        "bad reviews",
        "poorly rated",
        "low ratings",
        "disappoints its guests",
    ]


def test_reviews_are_clean_english(complete):
    for review in (example.response for example in complete):
        assert re.fullmatch(r"[A-Z][A-Za-z,. -]*\.", review), review
        assert "  " not in review
        assert " ." not in review
        assert " ," not in review
        assert ".." not in review
        assert all(sentence[0].isupper() for sentence in review.split(". "))
        assert 1 <= review.count(".") <= 3
        assert len(review.split()) <= 30
        for article, word in re.findall(r"\b(an?) (\w+)", review):
            assert (article == "an") == (word[0] in "aeiouAEIOU"), review


def test_the_corpus_is_the_same_everywhere_and_follows_its_seed():
    def digest(examples):
        text = "\n".join(f"{example.prompt}\n{example.response}" for example in examples)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert digest(restaurants("train")) == "778f10ce92e1fdf9"
    assert digest(restaurants("held_out")) == "b39f6a7a169d00de"
    assert digest(restaurants("train", seed=1)) != digest(restaurants("train"))
    assert restaurants("train", size=10) == restaurants("train")[:10]


@pytest.mark.parametrize(
    ("settings", "message"), [(("test",), "split must be"), (("train", 1.5), "omission must be")]
)
def test_wrong_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        restaurants(*settings)
