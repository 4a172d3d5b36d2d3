import random
import time
from collections import Counter

import pytest

from hybrid_jax.metrics import overlap
from hybrid_jax.metrics.overlap import (
    edit_distance,
    edit_similarity,
    error_rate,
    exact_match,
    normalise_answer,
    rouge,
    sentence_bleu,
    sentence_chrf,
    token_f1,
)

CAT = "the cat sat on the mat", ["the cat is on the mat"]
ROMANIAN = (  # of sacrebleu's own tests
    "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;",
    ["Producţia de zahăr brut se exprimă în zahăr alb;"],
)


@pytest.mark.parametrize(
    ("smoothing", "cat", "romanian"),
    [
        ("exp", 0.37991784, 0.08493099),
        ("floor", 0.25406637, 0.04516881),
        ("add-k", 0.48549177, 0.14882560),
        ("none", 0.0, 0.0),
    ],
)
def test_sentence_bleu_has_sacrebleus_values(smoothing, cat, romanian):
    assert sentence_bleu(*CAT, smoothing=smoothing) == pytest.approx(cat, abs=1e-8)
    assert sentence_bleu(*ROMANIAN, smoothing=smoothing) == pytest.approx(romanian, abs=1e-8)


@pytest.mark.parametrize(("smoothing", "method"), [("floor", 1), ("add-k", 2), ("exp", 3)])
def test_smoothings_are_methods_of_nltk(smoothing, method):
    """Chen and Cherry 2014; but for what it gives without smoothing, 7e-78 in place of 0."""
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    text, references = CAT
    smoothed = getattr(nltk.SmoothingFunction(), f"method{method}")
    known = nltk.sentence_bleu([one.split() for one in references], text.split(), smoothing_function=smoothed)
    assert sentence_bleu(*CAT, smoothing=smoothing) == pytest.approx(known, abs=1e-9)


@pytest.mark.parametrize(
    ("max_order", "tokens", "expected"),
    [
        (4, "13a", 48.530827),
        (4, "none", 49.1919566),
        (4, "intl", 43.91623493),
        (1, "13a", 77.64837656),
        (2, "13a", 60.50312757),
    ],
)
def test_tokenizers_and_orders_reach_sacrebleu_by_its_names(max_order, tokens, expected):
    """The corpus of sacrebleu's README, as streams; effective order changes nothing in a corpus this long."""
    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    streams = [
        ["The dog bit the man.", "It was not unexpected.", "The man bit him first."],
        ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."],
    ]
    measure = overlap._bleu(max_order, False, tokens, "exp")
    assert measure.corpus_score(texts, streams).score == pytest.approx(expected, abs=1e-6)


def test_sentence_bleu_of_a_copy_is_1_however_short_and_of_nothing_0():
    assert sentence_bleu("Yes.", ["No way.", "Yes."]) == pytest.approx(1.0)
    assert sentence_bleu("", ["Yes."]) == 0.0
    assert sentence_bleu("YES.", ["yes."], lowercase=True) == pytest.approx(1.0)
    assert sentence_bleu("YES.", ["yes."]) < 0.5
    assert sentence_bleu("a b c d", ["a c b d"], max_order=1) == pytest.approx(1.0)


def test_sentence_bleu_reads_chinese_by_character():
    assert sentence_bleu("我喜欢猫", ["我喜欢狗"], tokens="zh") > 0.5 > sentence_bleu("我喜欢猫", ["我喜欢狗"])


def slow_chrf(text, reference, order, beta):
    """F of the mean precision and the mean recall over the lengths that both texts have."""
    text, reference = "".join(text.split()), "".join(reference.split())
    precisions, recalls = [], []
    for n in range(1, order + 1):
        ours, theirs = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (text, reference))
        if ours and theirs:
            shared = sum((ours & theirs).values())
            precisions.append(shared / sum(ours.values()))
            recalls.append(shared / sum(theirs.values()))
    p, r = (sum(values) / len(values) if values else 0.0 for values in (precisions, recalls))
    return (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0.0


def test_chrf_is_the_f_score_of_character_ngrams():
    for text, reference in [("the cat sat", "the cat is sitting"), ("日本語です", "日本です"), ("🙂🙂", "🙂")]:
        assert sentence_chrf(text, [reference]) == pytest.approx(slow_chrf(text, reference, 6, 2), abs=1e-9)
        assert sentence_chrf(text, [reference], char_order=3, beta=1) == pytest.approx(
            slow_chrf(text, reference, 3, 1), abs=1e-9
        )
    assert sentence_chrf("a dog", ["a cat", "a dog"]) == pytest.approx(1.0)
    assert sentence_chrf("b a", ["a b"], word_order=2) < sentence_chrf("a b", ["a b"], word_order=2)


def test_ter_counts_edits_and_one_for_a_shifted_phrase():
    assert error_rate("a b c d", ["a b c d"]) == 0.0
    assert error_rate("c d a b", ["a b c d"]) == pytest.approx(1 / 4)  # one shift
    assert error_rate("a x c", ["a b c d"]) == pytest.approx(2 / 4)  # one replaced, one missing
    assert error_rate("", ["a b"]) == 1.0
    assert error_rate("a b c d e f", ["a b"]) == 2.0  # unbounded
    assert error_rate("a b", ["x y", "a b"]) == 0.0


def test_ter_of_long_texts_is_the_word_error_rate():
    assert error_rate("c d a b", ["a b c d"], max_words=3) == 1.0
    assert error_rate("A b x", ["a b", "y z w v"], max_words=2) == pytest.approx(1 / 3)  # of the mean length 3
    assert error_rate("a b", [""], max_words=0) == 1.0


def test_rouge_has_the_values_of_its_own_tests():
    testing = dict.fromkeys(["precision", "recall", "f1"])
    for measure in testing:
        testing[measure] = rouge("testing", ["testing one two"], "rouge1", measure)
    assert testing == pytest.approx({"precision": 1.0, "recall": 1 / 3, "f1": 1 / 2})
    assert rouge("testing one", ["testing one two"], "rouge2") == pytest.approx(2 / 3)
    assert rouge("testing one", ["testing one two"], "rougeL") == pytest.approx(4 / 5)


def test_rouge_lsum_joins_the_matches_of_all_sentences():
    text, reference = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    values = [rouge(text, [reference], "rougeLsum", measure) for measure in ("recall", "precision", "f1")]
    assert values == pytest.approx([0.8, 0.4, 0.533333], abs=1e-6)
    turned, straight = "w3 w4\nw1 w2", ["w1 w2\nw3 w4"]
    assert (rouge(turned, straight, "rougeLsum"), rouge(turned, straight, "rougeL")) == (1.0, 0.5)
    sentence = "W1 w2 w6 w7 w8. W1 w3 w8 w9 w5."  # on one line: we split it ourselves
    assert rouge(sentence, [reference], "rougeLsum") == pytest.approx(0.533333, abs=1e-6)


def test_rouge_takes_the_best_reference_of_the_measure_asked_for():
    assert rouge("a b", ["a b c d", "x"], "rouge1", "recall") == pytest.approx(0.5)
    assert rouge("running dogs", ["run dog"], "rouge1") == 1.0
    assert rouge("running dogs", ["run dog"], "rouge1", stemmer=False) == 0.0
    assert rouge("漢字", ["漢字"]) == 0.0  # its tokens are a-z and 0-9
    assert rouge("x " * 50 + "a b", ["a b"], "rougeL", max_words=50) == 0.0


def test_answers_are_compared_as_squad_does():
    assert normalise_answer("The  Eagle's (nest), an   A.") == "eagles nest"
    assert exact_match("the Eagle!", ["owl", "Eagle"]) == 1.0
    assert exact_match("the Eagle!", ["Eagle"], normalise=False) == 0.0
    assert exact_match(" Eagle\n", ["Eagle"], normalise=False) == 1.0
    assert token_f1("the big red dog dog", ["a red dog"]) == pytest.approx(2 * 2 / (4 + 2))
    assert token_f1("dog dog", ["dog dog cat"]) == pytest.approx(2 * 2 / (2 + 3))
    assert token_f1("cat", ["dog", "a cat sat"]) == pytest.approx(2 / 3)
    assert (token_f1("", ["the"]), token_f1("", ["dog"]), token_f1("dog", ["a"])) == (1.0, 0.0, 0.0)


def slow_edit_distance(first, second):
    row = list(range(len(second) + 1))
    for i, x in enumerate(first, 1):
        old, row = row, [i]
        for j, y in enumerate(second, 1):
            row.append(min(old[j] + 1, row[-1] + 1, old[j - 1] + (x != y)))
    return row[-1]


def test_edit_distance_is_that_of_the_table():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance(["a", "b"], ["b"]) == 1
    rng = random.Random(0)
    for _ in range(500):
        first, second = ("".join(rng.choices("ab🙂", k=rng.randrange(12))) for _ in range(2))
        assert edit_distance(first, second) == slow_edit_distance(first, second), (first, second)


def test_edit_similarity_is_a_share_of_the_longer_text():
    assert edit_similarity("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert edit_similarity("kitten", ["x", "kitten"]) == 1.0
    assert (edit_similarity("", [""]), edit_similarity("", ["ab"])) == (1.0, 0.0)


def test_a_text_of_100k_characters_takes_no_longer_than_a_breath():
    long = "word and more, " * 6667
    for measure in (sentence_bleu, error_rate, rouge, edit_similarity, token_f1, exact_match):
        start = time.monotonic()
        measure(long, ["a short reference", "another, with more words."])
        assert time.monotonic() - start < 5, measure  # 0.3 s at most, measured alone
