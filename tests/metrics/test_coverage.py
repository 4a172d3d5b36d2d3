import random

import pytest

from hybrid_jax.metrics.coverage import concept_recall

CONCEPTS = ["dog", "frisbee", "catch", "running track"]


def test_concepts_are_found_in_any_inflection_and_phrases_as_a_whole():
    assert concept_recall("The dogs were catching a frisbee on running tracks.", CONCEPTS) == 1.0
    assert concept_recall("A dog on a track, running.", CONCEPTS) == 0.25
    assert concept_recall("", CONCEPTS) == 0.0
    assert concept_recall("我喜欢 🙂 猫", ["猫", "狗"]) == 0.5


def test_equal_concepts_count_once():
    assert concept_recall("dogs", ["dog", "Dogs", "cat"]) == 0.5


def test_only_the_first_words_count_where_there_is_a_limit():
    text = "word " * 9 + "dog cat"
    assert concept_recall(text, ["dog", "cat"], max_words=10) == 0.5
    assert concept_recall(text, ["dog", "cat"], max_words=11) == 1.0


def test_what_has_no_word_is_no_concept():
    with pytest.raises(ValueError, match="concepts must hold at least one word"):
        concept_recall("text", ["!", ""])
    assert concept_recall("x" * 100_000, ["x"]) == 0.0


def test_coverage_is_monotone_submodular_and_ignores_duplicates():
    """f(A + x) - f(A) >= f(B + x) - f(B) for sets of sentences A within B, but for rounding."""
    rng = random.Random(0)
    concepts = [f"noun{i}" for i in range(12)]

    def covered(chosen):
        return concept_recall(". ".join(chosen), concepts)

    for _ in range(200):
        sentences = [" ".join(rng.sample([*concepts, "other", "words"], 4)) for _ in range(6)]
        larger = rng.sample(sentences[1:], rng.randrange(6))
        smaller = [sentence for sentence in larger if rng.random() < 0.5]
        new = sentences[0]
        gains = [covered([*chosen, new]) - covered(chosen) for chosen in (smaller, larger)]
        assert gains[0] >= gains[1] - 1e-12 >= -2e-12
        assert 0 <= covered(smaller) <= covered(larger) <= 1
        assert covered(larger * 2) == covered(larger)
    assert covered(concepts) == 1.0
