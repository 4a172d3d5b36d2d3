"""Models of order k see k tokens exactly: against loops over windows, and bit for bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.markov import FeedForwardSettings, MarkovSettings, windows
from hybrid_jax.models.ngrams import NGrams

K, V, T = 3, 11, 12
DECODER = DecoderConfig(num_layers=2, width=16, num_heads=2, max_length=8, dropout=0.2)
VIEW = MarkovSettings(DECODER, order=K)
PLAIN = FeedForwardSettings(order=K, embedding_width=5, width=7, dropout=0.2)
MODELS = {"markov": VIEW, "feed_forward": PLAIN, "feed_forward, not direct": replace(PLAIN, direct=False)}
SEGMENTS = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1, 0, 1, 1, 2, 0, 2, 2, 2, 3, 3, 3]])


def drawn(model, seed=0):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), jnp.float32), shapes)


def tokens_of(rows=2, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (rows, T)))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param].build(V)


def test_windows_hold_the_last_tokens_of_a_segment_without_what_is_padding():
    tokens = np.asarray(tokens_of())
    found, mask = map(np.asarray, windows.windows_of(jnp.asarray(tokens), jnp.asarray(SEGMENTS), K))
    for row in range(2):
        seen: dict[int, list[int]] = {}
        for t, segment in enumerate(SEGMENTS[row]):
            if segment == 0:
                continue
            seen.setdefault(segment, []).append(tokens[row, t])
            expected = seen[segment][-K:]
            assert found[row, t][mask[row, t]].tolist() == expected
            assert mask[row, t].tolist() == [False] * (K - len(expected)) + [True] * len(expected)


def test_what_is_older_than_k_tokens_changes_no_bit(model):
    params, tokens = drawn(model), tokens_of()
    apply = jax.jit(model.apply)
    before = np.asarray(apply(params, tokens).logits)
    for t in range(T):
        after = np.asarray(apply(params, tokens.at[:, t].set((tokens[:, t] + 1) % V)).logits)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t : t + K] != before[:, t : t + K]).any(axis=-1).all()  # every token that it sees
        np.testing.assert_array_equal(after[:, t + K :], before[:, t + K :])


def test_equal_windows_score_equal_wherever_they_lie(model):
    params, tokens = drawn(model), tokens_of(1)
    moved = jnp.roll(tokens, 4, axis=1)
    apply = jax.jit(model.apply)
    first, second = (np.asarray(apply(params, x).logits[0]) for x in (tokens, moved))
    np.testing.assert_array_equal(first[K - 1 : T - 4], second[K - 1 + 4 :])


def test_packed_rows_score_as_each_sequence_alone_and_probabilities_sum_to_one(model):
    params, tokens = drawn(model), tokens_of()
    apply = jax.jit(model.apply)
    packed = np.asarray(apply(params, tokens, jnp.asarray(SEGMENTS)).logits)
    for row, segment in ((0, 1), (0, 2), (1, 2), (1, 3)):
        at = np.flatnonzero(SEGMENTS[row] == segment)
        alone = jnp.zeros((2, T), int).at[0, : len(at)].set(tokens[row, at])
        scores = apply(params, alone, jnp.zeros((2, T), int).at[0, : len(at)].set(1)).logits
        np.testing.assert_array_equal(packed[row, at], scores[0, : len(at)])
    np.testing.assert_allclose(np.exp(jax.nn.log_softmax(packed)).sum(-1), 1.0, atol=1e-5)


def test_a_view_scores_what_the_decoder_says_to_the_window_alone():
    model, decoder = VIEW.build(V), jax.jit(DECODER.build(V).apply)
    params, tokens = drawn(model), tokens_of(1)
    scores = jax.jit(model.apply)(params, tokens).logits[0]
    for t in range(T):
        window = tokens[:, max(0, t - K + 1) : t + 1]
        np.testing.assert_allclose(scores[t], decoder(params, window).logits[0, -1], atol=1e-5)


def test_a_feed_forward_model_is_the_equation_of_its_paper():
    model = PLAIN.build(V)
    params, tokens = drawn(model), tokens_of(1)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    scores = model.apply(params, tokens).logits[0]
    head = p["lm_head"]["kernel"]
    for t in range(T):
        words = [p["start"]["bias"]] * max(0, K - 1 - t)
        words += [p["token_embedding"]["embedding"][int(w)] for w in tokens[0, max(0, t - K + 1) : t + 1]]
        x = np.concatenate(words)
        hidden = np.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
        expected = p["lm_head"]["bias"] + x @ head[PLAIN.width :] + hidden @ head[: PLAIN.width]
        np.testing.assert_allclose(scores[t], expected, atol=1e-5)


def test_reading_in_pieces_gives_the_same_scores_and_gradients(model, monkeypatch):
    params, tokens = drawn(model), tokens_of()

    def loss(params):
        return jnp.sum(
            jnp.sin(model.apply(params, tokens, jnp.asarray(SEGMENTS)).logits) * (SEGMENTS > 0)[..., None]
        )

    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(windows, "_AT_ONCE", 5 * K)  # 24 windows in 5 pieces, the last of them not full
    parts = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), parts, whole)


@pytest.mark.parametrize("at_once", [10_000, 4 * K])
def test_padding_has_no_part_in_the_losses_of_the_model_inside(at_once, monkeypatch):
    """The router of experts counts real tokens alone, also where the last piece of windows is not full."""
    monkeypatch.setattr(windows, "_AT_ONCE", at_once)
    experts = Experts(4, 2, 8, balance_coef=0.01, z_coef=0.01)
    decoder = DecoderConfig(num_layers=1, width=8, num_heads=1, max_length=8, mlp="gated", experts=experts)
    model = MarkovSettings(decoder, K).build(V)
    params, tokens = drawn(model), tokens_of(1)[:, :7]
    _, alone = model.hidden_and_losses(params, tokens)
    padded = jnp.pad(tokens, ((0, 0), (6, 3)), constant_values=2)
    _, losses = model.hidden_and_losses(params, padded, jnp.pad(jnp.ones((1, 7), int), ((0, 0), (6, 3))))
    assert alone.keys() == {"balance", "z"} or len(alone) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses, alone)
    assert all(float(loss.weight) == 1 + 2 + 5 * K for loss in alone.values())


def test_dropout_acts_where_a_key_is_given_alone(model):
    params, tokens = drawn(model), tokens_of()
    hidden = jax.jit(lambda key: model.hidden(params, tokens, dropout_key=key))
    one, two = (hidden(jax.random.key(n)) for n in (0, 1))
    assert np.abs(one - two).max() > 0.01
    plain = jax.jit(lambda: model.hidden(params, tokens))()
    assert np.abs(one - plain).max() > 0.01
    np.testing.assert_array_equal(jax.jit(model.apply)(params, tokens).hidden, plain)


def test_a_view_of_more_than_the_model_can_read_or_of_no_language_model_is_one_line():
    with pytest.raises(UserError, match="order must be at most 8, what the model can read, got 9"):
        replace(VIEW, order=9).build(V)
    with pytest.raises(UserError, match="markov needs a language model, got ngrams"):
        MarkovSettings(NGrams()).build(V)
