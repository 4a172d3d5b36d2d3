"""What holds for every setting of the decoder: cached = full, padding and packing change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import BACKBONES, LanguageModel
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.heads import init_value_head, value

VOCAB = 31
SMALL = {"num_layers": 2, "width": 16, "num_heads": 4, "max_length": 64}
SETTINGS = {
    "gpt2": DecoderConfig(**SMALL),
    "llama": DecoderConfig(
        **SMALL,
        num_kv_heads=2,
        position="rotary",
        norm="rms",
        mlp="gated",
        activation="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_embeddings=False,
    ),
    "mixed": DecoderConfig(
        **SMALL,
        num_kv_heads=1,
        head_width=6,
        mlp_width=24,
        position="rotary",
        activation="relu",
        mlp_bias=False,
    ),
}


@pytest.fixture(params=["gpt2", pytest.param("llama", marks=pytest.mark.slow), "mixed"], scope="module")
def model_and_params(request):
    """Random biases and scales too: a wrong bias must not hide behind zeros."""
    model, random = SETTINGS[request.param].build(VOCAB), np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0.1, 0.2, leaf.shape), jnp.float32)  # noqa: E731
    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def _tokens(*shape):
    return jax.random.randint(jax.random.key(1), shape, 0, VOCAB)


def test_a_decoder_is_a_hashable_language_model():
    model = BACKBONES["decoder"](**SMALL).build(VOCAB)
    assert isinstance(model, LanguageModel)
    assert hash(model) == hash(DecoderConfig(**SMALL).build(VOCAB))
    assert (model.vocab_size, model.width, model.max_length) == (31, 16, 64)


@pytest.mark.slow
def test_the_number_of_parameters_is_that_of_gpt2():
    model = DecoderConfig(num_layers=12, width=768, num_heads=12, max_length=1024).build(50257)
    shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
    assert sum(leaf.size for leaf in shapes) == 124_439_808  # the published small GPT-2


def test_initial_weights_have_the_spread_of_gpt2():
    model = DecoderConfig(num_layers=2, width=128, num_heads=4).build(256)
    params = model.init(jax.random.key(0))
    assert np.std(params["token_embedding"]["embedding"]) == pytest.approx(0.02, rel=0.03)
    assert np.std(params["layer_0"]["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.03)
    assert np.std(params["layer_1"]["mlp"]["down"]["kernel"]) == pytest.approx(0.01, rel=0.03)  # 0.02 / √(2·2)
    assert np.std(params["layer_1"]["attention"]["output"]["kernel"]) == pytest.approx(0.01, rel=0.03)


def test_reading_from_the_cache_equals_reading_the_whole_sequence(model_and_params):
    model, params = model_and_params
    tokens = _tokens(3, 20)
    mask = jnp.arange(20)[None] >= jnp.array([[0], [5], [9]])
    whole = jax.jit(model.apply)(params, tokens, mask).logits
    logits, cache = jax.jit(model.prefill)(params, tokens[:, :12], mask[:, :12], model.init_cache(3, 20))
    step = jax.jit(model.step)
    for t in range(12, 20):
        np.testing.assert_allclose(logits, whole[:, t - 1], atol=1e-5)
        logits, cache = step(params, tokens[:, t], cache)
    np.testing.assert_allclose(logits, whole[:, 19], atol=1e-5)


def test_left_padding_changes_nothing(model_and_params):
    model, params = model_and_params
    tokens = _tokens(2, 12)
    padded = jnp.concatenate([_tokens(2, 7), tokens], 1)
    mask = jnp.broadcast_to(jnp.arange(19) >= 7, (2, 19))
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(params, padded, mask).logits[:, 7:], apply(params, tokens).logits, atol=1e-5
    )


def test_packed_sequences_equal_separate_ones(model_and_params):
    model, params = model_and_params
    first, second = _tokens(1, 9), _tokens(2, 6)[1:]
    packed = jnp.concatenate([first, second, _tokens(1, 3)], 1)
    segment_ids = jnp.array([[1] * 9 + [2] * 6 + [0] * 3])
    apply = jax.jit(model.apply)
    logits = apply(params, packed, segment_ids).logits
    np.testing.assert_allclose(logits[:, :9], apply(params, first).logits, atol=1e-5)
    np.testing.assert_allclose(logits[:, 9:15], apply(params, second).logits, atol=1e-5)


def test_a_row_of_only_padding_gives_numbers(model_and_params):
    model, params = model_and_params
    mask = jnp.array([[True] * 8, [False] * 8])
    loss = lambda p: jnp.mean(jnp.square(model.apply(p, _tokens(2, 8), mask).logits))  # noqa: E731
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)))
    logits, cache = jax.jit(model.prefill)(params, _tokens(2, 8), mask, model.init_cache(2, 9))
    assert np.isfinite(logits).all()
    assert np.isfinite(jax.jit(model.step)(params, _tokens(2), cache)[0]).all()


def test_logits_stay_float32_in_bfloat16():
    model = DecoderConfig(**SMALL).build(VOCAB)
    half = DecoderConfig(**SMALL, dtype="bfloat16").build(VOCAB)
    params = model.init(jax.random.key(0))
    expected, output = (jax.jit(m.apply)(params, _tokens(2, 8)) for m in (model, half))
    assert (output.logits.dtype, output.hidden.dtype) == (jnp.float32, jnp.bfloat16)
    # rounding the inputs of the head alone is 2^-9 of the largest; a few layers add to that
    assert np.abs(output.logits - expected.logits).max() < 0.03 * np.abs(expected.logits).max()


def test_dropout_acts_only_where_a_key_is_given():
    model = DecoderConfig(**SMALL, dropout=0.5).build(VOCAB)
    params, tokens = model.init(jax.random.key(0)), _tokens(2, 8)
    hidden = jax.jit(lambda seed: model.hidden(params, tokens, dropout_key=jax.random.key(seed)))
    still = jax.jit(model.hidden)(params, tokens)
    without = DecoderConfig(**SMALL).build(VOCAB)
    np.testing.assert_array_equal(still, jax.jit(without.hidden)(params, tokens))
    assert not np.allclose(hidden(0), still)
    assert not np.allclose(hidden(0), hidden(1))
    np.testing.assert_array_equal(hidden(0), hidden(0))


def test_the_value_head_starts_at_zero_and_is_linear():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 4))
    head = init_value_head(4)
    assert not np.any(value(head, hidden))
    head = {"kernel": jnp.array([[1.0], [2.0], [0.0], [-1.0]]), "bias": jnp.array([0.5])}
    expected = hidden[..., 0] + 2 * hidden[..., 1] - hidden[..., 3] + 0.5
    np.testing.assert_allclose(value(head, hidden), expected, atol=1e-6)
    assert value(head, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_heads": 3}, "width must be a multiple of num_heads=3, got 16"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
        ({"num_layers": 0}, "num_layers must be in \\[1, 1024\\], got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"head_width": 5, "position": "rotary"}, "head_width must be even for such rotary positions, got 5"),
    ],
)
def test_impossible_settings_say_what_they_must_be(setting, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DecoderConfig(**(SMALL | setting))


def test_the_vocabulary_comes_from_the_tokenizer_and_may_be_larger():
    assert DecoderConfig(**SMALL, vocab_size=40).build(VOCAB).vocab_size == 40
    with pytest.raises(UserError, match="vocab_size must be at least the tokenizer's 31, got 30"):
        DecoderConfig(**SMALL, vocab_size=30).build(VOCAB)
    with pytest.raises(UserError, match="vocab_size is missing"):
        DecoderConfig(**SMALL).build()
