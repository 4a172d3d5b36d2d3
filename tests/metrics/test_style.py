from collections import defaultdict

import numpy as np
import pytest

from hybrid_jax.data.sources import json_rows
from hybrid_jax.metrics.style import flesch_reading_ease, formality, reading_ease, syllables, word_class
from hybrid_jax.metrics.text import sentences


def test_reading_ease_is_the_formula_of_flesch():
    assert flesch_reading_ease(15, 2, 19) == pytest.approx(92.06, abs=0.005)
    text = "The cat sat on the mat. It was a sunny day, and everybody was happy."
    assert reading_ease(text) == pytest.approx(92.0625)  # exactly; 89.24 with rounded syllables a word
    assert reading_ease("... !") is None


def test_syllables_come_from_hyphenation():
    assert [syllables(word) for word in ("cat", "sunny", "everybody", "漢字", "x" * 100_000)] == [1, 2, 3, 1, 1]


def test_sentences_end_at_their_marks_but_not_after_titles_and_initials():
    text = 'Mr. Smith of St. Ives said: "Go!" Why? J. R. knows... it is 3.5 km.\n你好。再见！ no mark'
    assert sentences(text) == [
        'Mr. Smith of St. Ives said: "Go!"',
        "Why?",
        "J. R. knows...",
        "it is 3.5 km.",
        "你好。",
        "再见！",
        "no mark",
    ]
    assert sentences("") == sentences(" \n ") == []
    assert sentences("!?" * 50_000 + "a") == ["!?" * 50_000 + "a"]


def test_formality_is_the_f_score_of_the_guessed_classes():
    # article noun preposition article noun: all five formal
    assert formality("The approval of the committee") == 100.0
    # pronoun verb adverb, interjection: all informal
    assert formality("I was really... wow!") == 0.0
    # we and had count against it, the and room for it, and the noun meeting, by its ending a verb, against it
    assert formality("We had the meeting room") == pytest.approx(50 + 50 * (-1 - 1 + 1 - 1 + 1) / 5)
    assert formality("") == formality("🙂") == 50.0


@pytest.mark.parametrize(
    ("word", "name"),
    {
        "the": "article",
        "isn’t": "verb",
        "quickly": "adverb",
        "only": "adverb",
        "happiness": "noun",
        "enormous": "adjective",
        "running": "verb",
        "fly": "noun",
        "zxq": "noun",
        "and": "conjunction",
    }.items(),
)
def test_a_word_has_the_class_of_the_list_or_of_its_ending(word, name):
    assert word_class(word) == name


def true_sign(token, tag):
    """Of a treebank's word in the F-score; None is no word."""
    if tag in ("PUNCT", "SYM", "NUM", "X"):
        return None
    if tag == "DET":
        return {"a": 1, "an": 1, "the": 1}.get(
            token.lower(), -(token.lower() in ("this", "that", "these", "those"))
        )
    formal, informal = ("NOUN", "PROPN", "ADJ", "ADP"), ("PRON", "VERB", "AUX", "ADV", "INTJ")
    return (tag in formal) - (tag in informal)


def test_formality_of_documents_follows_the_f_score_of_their_true_classes(shared_data):
    """0.93 measured on the 65 documents of at least 100 words of three parts of the English Web Treebank."""
    documents = defaultdict(list)
    for part in ("train", "validation", "test"):
        for _, row in json_rows(shared_data / "ud_ewt_pos" / f"{part}.jsonl"):
            pairs = zip(row["tokens"], row["tags"], strict=True)
            documents[row["doc"]] += [(t, s) for t, tag in pairs if (s := true_sign(t, tag)) is not None]
    long = [document for document in documents.values() if len(document) >= 100]
    exact = [sum(sign for _, sign in document) / len(document) for document in long]
    ours = [formality(" ".join(token for token, _ in document)) for document in long]
    assert len(long) == 65
    assert np.corrcoef(exact, ours)[0, 1] > 0.9
