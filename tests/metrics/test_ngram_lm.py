import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from hybrid_jax.metrics.ngram_lm import NgramModel
from hybrid_jax.metrics.ngram_text import NgramText, split, vocabulary_of

SYMBOLS = "<>abcdeg"
CORPUS = [[SYMBOLS.index(s) for s in f"<{word}>"] for word in ("abcd", "egad", "abcde", "abba")]


def distribution_after(model, context):
    """``P(. | context)``, a token after the other."""
    with np.errstate(divide="ignore"):  # without a share of the uniform distribution some are 0
        return np.exp([model.log_probs([*context, token])[-1] for token in range(model.vocab_size)])


def after_a(smoothing, discount=None):
    """P(b | a), P(d | a), P(g | a)."""
    model = NgramModel.train(CORPUS, len(SYMBOLS), 1, smoothing, discount, uniform_share=0.0)
    distribution = distribution_after(model, [SYMBOLS.index("a")])
    assert distribution.sum() == pytest.approx(1.0, abs=1e-12)
    return [distribution[SYMBOLS.index(s)] for s in "bdg"]


def test_bigrams_have_the_probabilities_of_nltk():
    assert after_a("kneser_ney", 0.75) == pytest.approx([0.514286, 0.114286, 0.032143], abs=1e-6)
    assert after_a("witten_bell") == pytest.approx([0.435, 0.17, 0.015], abs=1e-12)


def slow_probability(sequences, vocab_size, context, smoothing, token, history):
    """The definition, with dictionaries; shares no code with the model."""
    grams = [defaultdict(Counter) for _ in range(context + 1)]
    before = defaultdict(set)
    for sequence in sequences:
        for i, w in enumerate(sequence):
            for k in range(min(i, context) + 1):
                grams[k][tuple(sequence[i - k : i])][w] += 1
                if i > k:
                    before[(*sequence[i - k : i], w)].add(sequence[i - k - 1])

    def count(h, w):
        if smoothing == "kneser_ney" and len(h) < context:
            return len(before[(*h, w)])
        return grams[len(h)][h][w]

    def discount(k):
        counts = [count(h, w) for h, following in grams[k].items() for w in following]
        once, twice = counts.count(1), counts.count(2)
        return once / (once + 2 * twice) if once else 0.5

    def probability(h):
        counts = {w: count(h, w) for w in range(vocab_size)}
        total, types = sum(counts.values()), sum(c > 0 for c in counts.values())
        lower = probability(h[1:]) if h else 1 / vocab_size
        if total == 0:
            return lower
        if not h:
            share = types / (total + types)
            return (1 - share) * counts[token] / total + share * lower
        if smoothing == "witten_bell":
            return (counts[token] + types * lower) / (total + types)
        d = discount(len(h))
        return (max(counts[token] - d, 0) + d * types * lower) / total

    return probability(tuple(history[max(0, len(history) - context) :]))


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_log_probs_are_those_of_the_definition(smoothing, context):
    rng = np.random.default_rng(context)
    sequences = [rng.integers(0, 4, n).tolist() for n in (30, 0, 1, 17)]
    model = NgramModel.train(sequences, 6, context, smoothing)  # tokens 4 and 5 are never seen
    text = [0, 1, 2, 3, 3, 4, 1, 2, 0, 5, 5, *sequences[0][:6]]
    expected = [
        math.log(slow_probability(sequences, 6, context, smoothing, text[t], text[:t]))
        for t in range(len(text))
    ]
    np.testing.assert_allclose(model.log_probs(text), expected, atol=1e-12)


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
def test_probabilities_after_any_context_sum_to_1_and_are_above_0(smoothing):
    rng = np.random.default_rng(0)
    model = NgramModel.train([rng.integers(0, 7, 300), rng.integers(0, 7, 5)], 9, 4, smoothing)
    for length in (0, 1, 2, 3, 4, 9):
        for _ in range(20):
            distribution = distribution_after(model, rng.integers(0, 9, length))
            assert distribution.sum() == pytest.approx(1.0, abs=1e-12)
            assert distribution.min() > 0


def test_a_model_of_nothing_has_the_perplexity_of_its_vocabulary():
    for smoothing in ("kneser_ney", "witten_bell"):
        model = NgramModel.train([], 17, 3, smoothing)
        assert np.exp(-model.log_probs([3, 5, 16, 0]).mean()) == pytest.approx(17.0)
    uniform = NgramModel.train([np.arange(17)], 17, 0)
    assert np.exp(-uniform.log_probs([3, 5, 16, 0]).mean()) == pytest.approx(17.0)


CHAIN = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])  # stationary: .375 .375 .25
ALTERNATION = np.array([[[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]])  # P(x | the last two)


def circular(source, length):
    """A circle of symbols in which every context and symbol stand together as often as is expected.

    Expected counts that are whole numbers make a graph of contexts with as many ways out as in: the circle
    follows each once (Hierholzer).
    """
    order = source.ndim - 1
    joint = np.full(source.shape[:-1], 1 / source[..., 0].size)
    for _ in range(500):  # to the stationary law of contexts
        joint = (joint[..., None] * source).sum(axis=0)
    counts = joint[..., None] * source * length
    left = np.rint(counts).astype(int)
    np.testing.assert_allclose(left, counts, atol=1e-9)
    path, walk = [], [(0,) * order]
    while walk:
        (symbols,) = np.nonzero(left[walk[-1]])
        if len(symbols):
            left[(*walk[-1], symbols[0])] -= 1
            walk.append((*walk[-1][1:], int(symbols[0])))
        else:
            path.append(walk.pop()[-1])
    assert len(path) == length + 1
    return path[:0:-1]


def perplexity(circle, vocab_size, context):
    """Of plain relative frequencies, each symbol of the circle seen after its ``context`` predecessors."""
    text = [*circle[len(circle) - context :], *circle]
    model = NgramModel.train([text], vocab_size, context, discount=0.0, uniform_share=0.0)
    return math.exp(-model.log_probs(text)[context:].mean())


def test_markov_sources_have_the_perplexity_of_their_entropy_rate():
    chain, alternation = circular(CHAIN, 80), circular(ALTERNATION, 40)
    assert np.bincount(chain).tolist() == [30, 30, 20]
    found = [perplexity(chain, 3, context) for context in (0, 1)]
    assert found == pytest.approx([2.951152, 2.704926], abs=1e-6)
    found = [perplexity(alternation, 2, context) for context in (0, 1, 2)]
    assert found == pytest.approx([2.0, 2.0, 1.384145], abs=1e-6)


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
@pytest.mark.parametrize("context", [1, 3])
def test_a_model_of_samples_comes_near_the_entropy_rate_and_not_below_the_source(smoothing, context):
    steps = np.random.default_rng(0).random(300_000)
    thresholds = CHAIN.cumsum(axis=1)[:, :2].tolist()
    sampled = [0]
    for step in steps:
        first, second = thresholds[sampled[-1]]
        sampled.append(int(step > first) + int(step > second))
    train, held_out = sampled[:200_000], sampled[200_000:]
    model = NgramModel.train([train], 3, context, smoothing)
    found = math.exp(-model.log_probs(held_out)[1:].mean())
    source = math.exp(-np.log(CHAIN[held_out[:-1], held_out[1:]]).mean())
    assert source <= found == pytest.approx(2.704926, abs=0.01)


def test_tokens_older_than_the_context_change_no_bit():
    rng = np.random.default_rng(0)
    model = NgramModel.train([rng.integers(0, 5, 500)], 5, 3)
    text = rng.integers(0, 5, 40)
    other = np.concatenate([rng.integers(0, 5, 20), text[20:]])
    assert (text[:20] != other[:20]).any()
    assert model.log_probs(text)[23:].tobytes() == model.log_probs(other)[23:].tobytes()


def test_no_ngram_reaches_over_a_boundary():
    apart, together = (
        NgramModel.train(data, 3, 1, "witten_bell") for data in ([[0, 1], [2, 1]], [[0, 1, 2, 1]])
    )
    assert (
        distribution_after(together, [1])[2]
        > distribution_after(apart, [1])[2]
        == distribution_after(apart, [])[2]
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"context": -1}, "context must be at least 0 tokens, got -1"),
        ({"smoothing": "laplace"}, "smoothing must be kneser_ney or witten_bell, got 'laplace'"),
        ({"discount": 1.5}, r"discount must be in \[0, 1\], got 1.5"),
        ({"uniform_share": -0.1}, r"uniform_share must be in \[0, 1\], got -0.1"),
        ({"vocab_size": 2}, r"tokens must be in \[0, 2\), got 0 to 2"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        NgramModel.train([[0, 2]], **{"vocab_size": 3, "context": 1, **settings})


def test_a_text_is_split_into_characters_or_lower_case_words_and_marks():
    assert split("Aé 漢", "character") == ["A", "é", " ", "漢"]
    assert split("It isn't far, 3.5 km!", "word") == ["it", "isn't", "far", ",", "3", ".", "5", "km", "!"]


def test_an_unknown_token_is_one_more_that_was_never_seen():
    model = NgramText.train(["a b", "b b a"], "word", 0)
    assert model.vocabulary == vocabulary_of(["b a"], "word") == {"a": 1, "b": 2}
    share = 2 / (5 + 2)  # two different of five tokens
    expected = [(1 - share) * 2 / 5 + share / 3, share / 3, share / 3]
    np.testing.assert_allclose(np.exp(model.log_probs("a zebra 漢")), expected)
    assert model.log_probs("").shape == (0,)


def shakespeare(shared_data):
    """nanoGPT's split of 1,003,854 and 111,540 characters, as ids of 65 characters."""
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    assert (len(ids), len(tokens)) == (65, 1_003_854 + 111_540)
    return tokens[:1_003_854], tokens[1_003_854:]


def loss(data, context, smoothing):
    return -NgramModel.train([data[0]], 65, context, smoothing).log_probs(data[1]).mean()


def test_bigrams_of_tiny_shakespeare_have_the_reference_loss(shared_data):
    data = shakespeare(shared_data)
    assert loss(data, 1, "witten_bell") == pytest.approx(2.4858, abs=1e-3)
    assert loss(data, 1, "kneser_ney") == pytest.approx(2.4844, abs=1e-3)


@pytest.mark.slow
def test_long_ngrams_of_tiny_shakespeare_have_the_reference_losses(shared_data):
    data = shakespeare(shared_data)
    kneser_ney = [loss(data, context, "kneser_ney") for context in range(2, 7)]
    assert kneser_ney == pytest.approx([2.0449, 1.7290, 1.5789, 1.5581, 1.5648], abs=5e-4)
    witten_bell = [loss(data, context, "witten_bell") for context in (0, 2, 3, 4, 5, 6, 7)]
    assert witten_bell == pytest.approx([3.3473, 2.0492, 1.7738, 1.6688, 1.6981, 1.7792, 1.8758], abs=1e-4)
