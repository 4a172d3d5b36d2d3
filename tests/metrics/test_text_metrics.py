import pytest

from hybrid_jax.metrics.text import corpus_bleu, distinct_n, mean_length, repetition_rate, words

# The example of sacrebleu's README: two references for each of three hypotheses.
HYPOTHESES = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_corpus_bleu_equals_sacrebleus_published_example():
    assert corpus_bleu(HYPOTHESES, REFERENCES) == pytest.approx(48.530827, abs=1e-5)


def test_corpus_bleu_of_a_copied_reference_is_100_whichever_reference_it_is():
    copies = [REFERENCES[0][1], REFERENCES[1][0], REFERENCES[2][1]]
    assert corpus_bleu(copies, REFERENCES) == pytest.approx(100.0)


def test_corpus_bleu_of_one_short_sentence_is_the_smoothed_golden_value():
    assert corpus_bleu(["the cat sat on the mat"], [["the cat is on the mat"]]) == pytest.approx(
        37.991784, abs=1e-5
    )


def test_corpus_bleu_takes_a_different_number_of_references_a_row():
    ragged = [REFERENCES[0][:1], REFERENCES[1], REFERENCES[2]]
    assert corpus_bleu(HYPOTHESES, ragged) == pytest.approx(
        48.530827, abs=1e-5
    )  # the one dropped was no better match


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [(["a", "b"], [["a"]]), ([], []), (["a"], ["a"]), (["a"], [[]])],
    ids=["too few", "empty", "a bare text", "no reference"],
)
def test_corpus_bleu_refuses_references_of_another_form(hypotheses, references):
    with pytest.raises(ValueError, match="references must"):
        corpus_bleu(hypotheses, references)


def test_words_are_lower_case_and_without_punctuation():
    assert words("It isn't far: £20-25, at Café Brazil!") == [
        "it",
        "isn't",
        "far",
        "20",
        "25",
        "at",
        "café",
        "brazil",
    ]


def test_repetition_rate_is_the_share_of_ngrams_seen_before():
    assert repetition_rate("the the the the") == pytest.approx(2 / 3)  # bigrams: one new, two repeated
    assert repetition_rate("The cat saw the cat.") == pytest.approx(1 / 4)  # "the cat" twice among four
    assert repetition_rate("a b a b a", n=1) == pytest.approx(3 / 5)
    assert repetition_rate("a fox", n=3) == 0.0
    assert repetition_rate("") == 0.0


def test_distinct_n_counts_over_all_texts_together():
    assert distinct_n(["a b c", "a b d"], n=2) == pytest.approx(3 / 4)  # ab bc ab bd
    assert distinct_n(["a b c", "a b d"], n=1) == pytest.approx(4 / 6)
    assert distinct_n(["", "a"], n=2) == 0.0


def test_mean_length_is_in_words():
    assert mean_length(["one two", "three.", ""]) == pytest.approx(1.0)
    assert mean_length([]) == 0.0
