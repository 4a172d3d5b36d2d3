"""Temperature, top-k and top-p against golden numbers, and the draw against the exact distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

from hybrid_jax.sampling import logits as logits_module
from hybrid_jax.sampling.logits import draw, keep_top_k, keep_top_p, sample_token, sampling_logits

P = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """What is traced is for this platform; a function that was traced before must not be jitted again."""
    monkeypatch.setattr(logits_module, "target_platform", lambda: request.param)
    return request.param


def _noise(key, rows):
    return jax.random.uniform(key, (rows, 2))


def _probabilities(order=slice(None), **settings):
    return np.asarray(jax.nn.softmax(sampling_logits(jnp.log(jnp.asarray(P[order])), **settings)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),  # 0.25 crosses 0.6 and stays
        ({"top_p": 0.75}, [2 / 3, 1 / 3, 0, 0, 0]),  # reached exactly: nothing more is needed
        # 0.5 + 0.25 + 0.15 against 0.9 is a matter of the last float32 bit, so just above it
        ({"top_p": 0.9001}, [0.515464, 0.257732, 0.154639, 0.072165, 0]),
        ({"top_p": 1.0}, P),
        ({"top_p": 1e-6}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.733568, 0.183392, 0.066020, 0.014378, 0.002641]),
        ({"temperature": 0.5, "top_p": 0.75}, [0.8, 0.2, 0, 0, 0]),  # temperature first
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 5}, P),
        ({"top_k": 50}, P),
        ({"top_k": 2, "top_p": 0.66}, [1, 0, 0, 0, 0]),  # top-p of what top-k left
    ],
)
def test_truncation_gives_the_golden_numbers_in_any_order_of_the_vocabulary(platform, settings, expected):
    np.testing.assert_allclose(_probabilities(**settings), expected, atol=2e-6)
    shuffled = np.array([3, 0, 4, 2, 1])
    np.testing.assert_allclose(_probabilities(shuffled, **settings), np.asarray(expected)[shuffled], atol=2e-6)


def test_equal_logits_are_cut_off_by_their_index(platform):
    flat = jnp.zeros((2, 4))
    np.testing.assert_array_equal(jnp.isfinite(keep_top_k(flat, 3)), [[True, True, True, False]] * 2)
    np.testing.assert_array_equal(jnp.isfinite(keep_top_p(flat, 0.5)), [[True, True, False, False]] * 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 20, "top_p": 0.9},
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ({}, {"temperature": 1.3}, {"top_k": 5}, {"top_p": 0.8})
        ),
    ],
    ids=str,
)
def test_draws_have_the_distribution_they_claim(platform, settings):
    """Every count lies within exact binomial bounds that all hold together with probability 1 - 1e-6."""
    vocab, rows, rounds = 300, 500, 200
    logits = 2.0 * jax.random.normal(jax.random.key(0), (vocab,))

    @jax.jit
    def sample(key):
        return sample_token(jnp.broadcast_to(logits, (rows, vocab)), _noise(key, rows), **settings)

    tokens, log_probs = map(np.asarray, jax.lax.map(sample, jax.random.split(jax.random.key(1), rounds)))
    masked = np.asarray(sampling_logits(logits, **settings), np.float64)
    weights = np.exp(masked - masked.max())
    probabilities = weights / weights.sum()
    counts = np.bincount(tokens.ravel(), minlength=vocab)
    tail = 1e-6 / (2 * vocab)
    assert np.all(counts >= binom.ppf(tail, rows * rounds, probabilities))
    assert np.all(counts <= binom.isf(tail, rows * rounds, probabilities))
    assert not counts[probabilities == 0].any()
    np.testing.assert_allclose(log_probs, np.log(probabilities[tokens]), atol=1e-5)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = jnp.full((4000, 260), -jnp.inf).at[:, 130].set(0.0).at[:, 257].set(0.0)
    tokens, log_probs = jax.jit(draw)(logits, _noise(jax.random.key(0), 4000))
    assert set(np.unique(tokens)) == {130, 257}
    np.testing.assert_allclose(log_probs, np.log(0.5), atol=1e-6)


def test_temperature_zero_takes_the_first_of_the_largest():
    token, log_prob = sample_token(
        jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), jnp.zeros((2, 2)), temperature=0
    )
    np.testing.assert_array_equal(token, [1, 0])
    np.testing.assert_array_equal(log_prob, [0.0, 0.0])


def _rows(vocab=300):
    """Logits that are hard to cut: random, with ties, with -inf, all equal, huge, tiny, of both zeros."""
    random = np.random.default_rng(0)
    normal = random.normal(0, 2, vocab)
    return np.stack(
        [
            normal,
            np.round(normal),
            np.where(random.random(vocab) < 0.9, -np.inf, normal),
            np.where(np.arange(vocab) % 100 == 7, 0.0, -np.inf),
            np.zeros(vocab),
            1e38 * random.uniform(-3, 3, vocab),
            1e-37 * random.integers(-9, 9, vocab),
            np.where(random.random(vocab) < 0.5, 0.0, -0.0),
            -np.abs(normal) * 1e-3,
        ]
    ).astype(np.float32)


def _ranking(row):
    """Token ids from the most likely on, equal ones by their index: Python's sort, which is stable."""
    return sorted(range(len(row)), key=lambda token: -float(row[token]))


@pytest.mark.parametrize("top_k", [1, 3, 50, 299, 300, 1000])
def test_top_k_keeps_the_first_k_of_a_stable_sort(platform, top_k):
    rows = _rows()
    kept = np.asarray(jax.jit(lambda x: keep_top_k(x, top_k))(jnp.asarray(rows)))
    for row, cut in zip(rows, kept, strict=True):
        first = _ranking(row)[:top_k]
        expected = np.full(len(row), -np.inf, np.float32)
        expected[first] = row[first]
        np.testing.assert_array_equal(cut, expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_of_a_stable_sort(platform, top_p):
    """Sums in float32 leave open whether p is reached only where they come within 1e-5 of it."""
    rows = _rows()
    kept = np.asarray(jax.jit(lambda x: keep_top_p(x, top_p))(jnp.asarray(rows)))
    for row, cut in zip(rows, kept, strict=True):
        ranking = _ranking(row)
        weights = np.exp(row[ranking].astype(np.float64) - float(row.max()))
        reached = np.cumsum(weights) / weights.sum()
        fewest, most = (
            int(np.argmax(reached >= p)) + 1 for p in (top_p - 1e-5, min(top_p + 1e-5, reached[-1]))
        )
        chosen = np.flatnonzero(np.isfinite(cut))
        assert fewest <= len(chosen) <= most
        np.testing.assert_array_equal(chosen, np.sort(ranking[: len(chosen)]))
        np.testing.assert_array_equal(cut[chosen], row[chosen])


@pytest.mark.parametrize(
    ("vocab", "settings"),
    [(3_000, {"top_k": 50}), (3_000, {"top_p": 0.9}), (50_257, {"top_k": 50, "top_p": 0.9})],
    ids=str,
)
def test_an_accelerator_samples_the_distribution_of_a_cpu(vocab, settings, monkeypatch):
    """Vocabularies of bfloat16 values, many of them equal: the same sets, the same log-probs."""
    logits = 3 * jax.random.normal(jax.random.key(0), (2, vocab)).astype(jnp.bfloat16).astype(jnp.float32)
    noise = _noise(jax.random.key(1), 2)
    found = {}
    for name in ("cpu", "gpu"):
        monkeypatch.setattr(logits_module, "target_platform", lambda name=name: name)
        masked = jax.jit(lambda x: sampling_logits(x, 0.7, **settings))(logits)
        token, log_prob = jax.jit(lambda x, noise: sample_token(x, noise, 0.7, **settings))(logits, noise)
        exact = jnp.take_along_axis(jax.nn.log_softmax(masked), token[:, None], 1)[:, 0]
        np.testing.assert_allclose(log_prob, exact, atol=2e-6)
        found[name] = np.isfinite(masked)
    np.testing.assert_array_equal(found["cpu"], found["gpu"])
    if "top_p" not in settings:
        assert np.all(found["gpu"].sum(1) == 50)


def test_an_accelerator_sorts_nothing(monkeypatch):
    monkeypatch.setattr(logits_module, "target_platform", lambda: "tpu")
    sample = lambda x, noise: sample_token(x, noise, 1.0, 50, 0.9)  # noqa: E731
    traced = str(jax.make_jaxpr(sample)(jnp.zeros((2, 300)), jnp.zeros((2, 2))))
    assert "sort[" not in traced
    assert "top_k[" not in traced
