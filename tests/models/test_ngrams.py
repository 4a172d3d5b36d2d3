"""The bag of hashed n-grams against Python loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.heads import ClassificationHead
from hybrid_jax.models.ngrams import NGrams, hashed
from hybrid_jax.models.scorer import TextScorer

ROWS = [[3, 1, 4, 1, 5], [9, 2], [6], []]
TRUNK = NGrams((1, 2, 3), bucket_bits=6, width=4).build(10)
SCORER = TextScorer(TRUNK, ClassificationHead(labels=("a", "b")))
APPLY = jax.jit(SCORER.apply)


def python_hash(tokens):
    """FNV-1a by words of 32 bits and MurmurHash3's finaliser, in integers."""
    h = 2166136261
    for token in tokens:
        h = ((h ^ token) * 16777619) % 2**32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return h ^ (h >> 16)


def python_scores(params, rows):
    table = np.asarray(params["trunk"]["ngrams"]["embedding"], np.float64)
    kernel, bias = (np.asarray(params["head"]["score"][name], np.float64) for name in ("kernel", "bias"))
    scores = []
    for row in rows:
        found = [table[token] for token in row]
        for n in (2, 3):
            found += [table[10 + python_hash(row[i : i + n]) % 64] for i in range(len(row) - n + 1)]
        mean = sum(found, np.zeros(4)) / max(len(found), 1)
        scores.append([sum(mean[d] * kernel[d, y] for d in range(4)) + bias[y] for y in range(2)])
    return np.array(scores)


def padded(rows, length, left=0, fill=0):
    tokens, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, left : left + len(row)], mask[i, left : left + len(row)] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.fixture(scope="module")
def params():
    fresh = SCORER.init(jax.random.key(0))
    score = {"kernel": jax.random.normal(jax.random.key(1), (4, 2)), "bias": jnp.ones(2)}
    return {**fresh, "head": {"score": score}}


def test_the_hash_is_that_of_a_loop_over_integers():
    tokens = np.random.default_rng(0).integers(0, 2**31 - 1, (200, 3))
    ours = hashed([jnp.asarray(column, jnp.int32) for column in tokens.T])
    assert ours.dtype == jnp.uint32
    assert np.asarray(ours).tolist() == [python_hash(row) for row in tokens.tolist()]


def test_order_counts_and_buckets_fill_evenly():
    assert python_hash([1, 2]) != python_hash([2, 1])
    pairs = np.stack(np.meshgrid(np.arange(128), np.arange(128)), -1).reshape(-1, 2)
    buckets = np.asarray(hashed([jnp.asarray(column) for column in pairs.T])) % 256
    counts = np.bincount(buckets, minlength=256)  # 64 each on average
    assert np.square(counts - 64).sum() / 64 < 400  # chi-squared of 255 degrees: 400 has p < 1e-7


def test_scores_are_those_of_a_loop(params):
    np.testing.assert_allclose(APPLY(params, *padded(ROWS, 5)), python_scores(params, ROWS), atol=1e-6)


def test_padding_and_its_tokens_change_nothing(params):
    expected = APPLY(params, *padded(ROWS, 5))
    for length, left, fill in ((8, 0, 7), (8, 3, 1), (16, 2, 9)):
        np.testing.assert_allclose(APPLY(params, *padded(ROWS, length, left, fill)), expected, atol=1e-6)


def test_rows_permute_with_their_scores(params):
    tokens, mask = padded(ROWS, 5)
    order = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_array_equal(APPLY(params, tokens[order], mask[order]), APPLY(params, tokens, mask)[order])


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="orders must be ascending"):
        NGrams((2, 1))
    with pytest.raises(ValueError, match="labels must be different names"):
        ClassificationHead(labels=("a", "a"))
