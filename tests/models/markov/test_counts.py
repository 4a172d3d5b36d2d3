"""N-gram models on the device against those in numpy, which nltk and dictionaries check (tests/metrics)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.metrics.ngram_lm import NgramModel
from hybrid_jax.models.markov.counts import CountsSettings, as_model, count_tokens

DATA = Path(__file__).parents[4] / "shared" / "data" / "tinyshakespeare"
SYMBOLS = "<>abcdeg"
V, ORDER = 9, 3
RANDOM = np.random.default_rng(0)
TEXTS = [RANDOM.choice(V - 2, size=n, p=RANDOM.dirichlet(np.ones(V - 2))).tolist() for n in (60, 1, 33, 2, 80)]


def after(model, params, contexts):
    """p(· | context) for each, of any length but 0."""
    longest = max(map(len, contexts))
    tokens = np.array([[0] * (longest - len(c)) + list(c) for c in contexts])
    mask = np.array([[0] * (longest - len(c)) + [1] * len(c) for c in contexts])
    scores = jax.jit(model.apply)(params, jnp.asarray(tokens), jnp.asarray(mask)).logits[:, -1]
    return np.exp(np.asarray(scores, np.float64))


@pytest.mark.parametrize(
    ("smoothing", "discount", "known"),
    [("kneser_ney", 0.75, [0.514286, 0.114286, 0.032143]), ("witten_bell", None, [0.435, 0.170, 0.015])],
)
def test_bigrams_have_the_probabilities_of_nltk(smoothing, discount, known):
    corpus = [[SYMBOLS.index(s) for s in f"<{word}>"] for word in ("abcd", "egad", "abcde", "abba")]
    counted = NgramModel.train(corpus, len(SYMBOLS), 1, smoothing, discount, uniform_share=0.0)
    (p,) = after(*as_model(counted), [[SYMBOLS.index("a")]])
    np.testing.assert_allclose(p[[SYMBOLS.index(s) for s in "bdg"]], known, atol=1e-6)


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
def test_every_context_has_the_probabilities_of_the_numpy_model_and_they_sum_to_one(smoothing):
    counted = NgramModel.train(TEXTS, V, ORDER, smoothing)
    contexts = [list(c) for c in np.ndindex(V, V, V)][::7] + [[t] for t in range(V)] + [TEXTS[0][3:5]]
    found = after(*as_model(counted), contexts)
    expected = [[np.exp(counted.log_probs([*context, w])[-1]) for w in range(V)] for context in contexts]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, atol=1e-5)


def test_what_is_older_than_the_order_changes_no_bit():
    model, params = count_tokens(TEXTS, ORDER, V)
    tokens = jnp.asarray([TEXTS[4][:12], TEXTS[0][:12]])
    apply = jax.jit(model.apply)
    scores = np.asarray(apply(params, tokens).logits)
    for t in range(12 - ORDER):
        changed = np.asarray(apply(params, tokens.at[:, t].set((tokens[:, t] + 1) % V)).logits)
        np.testing.assert_array_equal(scores[:, t + ORDER :], changed[:, t + ORDER :])
        assert (scores[:, t] != changed[:, t]).any()


def test_fresh_tables_are_uniform():
    model, params = count_tokens(TEXTS, ORDER, V)
    fresh = model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(after(model, fresh, [[1], [2, 3]]), 1 / V, rtol=1e-6)


def test_no_tokens_and_settings_of_nothing_counted_are_one_line():
    with pytest.raises(UserError, match="nothing to count"):
        count_tokens([[], []], 2, 5)
    with pytest.raises(UserError, match=r"comes from python -m hybrid_jax\.count"):
        CountsSettings().build(5)
    with pytest.raises(UserError, match="the counts are of 9 tokens, the tokenizer has 12"):
        count_tokens(TEXTS, 2, V)[0].settings.build(12)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs tiny Shakespeare")
@pytest.mark.parametrize(
    ("smoothing", "order", "nats"),
    [("witten_bell", 4, 1.6688), ("kneser_ney", 5, 1.5581), ("kneser_ney", 8, None)],
)
def test_tiny_shakespeare_has_the_known_nats_a_character(smoothing, order, nats):
    text = (DATA / "input.txt").read_text()
    vocabulary = {letter: i for i, letter in enumerate(sorted(set(text)))}
    tokens = np.array([vocabulary[letter] for letter in text])
    assert (len(tokens), len(vocabulary)) == (1_003_854 + 111_540, 65)
    counted = NgramModel.train([tokens[:1_003_854]], 65, order, smoothing)
    model, params = as_model(counted)
    held_out = tokens[1_003_854:]
    log_probs = jax.jit(model.apply)(params, jnp.asarray(held_out[None, :-1])).logits[0]
    found = -np.take_along_axis(np.asarray(log_probs), held_out[1:, None], axis=1).mean(dtype=np.float64)
    assert found == pytest.approx(-counted.log_probs(held_out)[1:].mean(), abs=1e-6)
    if nats is not None:
        assert found == pytest.approx(nats, abs=5e-4)
