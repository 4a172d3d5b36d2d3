"""Ancestral sampling: its log-probs, its end, its noise, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.sampling import ancestral
from hybrid_jax.sampling.ancestral import Ancestral, cache_lengths, generate
from hybrid_jax.sampling.base import SAMPLERS
from hybrid_jax.sampling.logits import sampling_logits

VOCAB, P, R = 29, 8, 12


@pytest.fixture(scope="module")
def model_and_params():
    """A model with opinions: weights ten times the usual, so that tokens differ in probability."""
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=32).build(VOCAB)
    random = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(random.normal(0, 0.4, leaf.shape), jnp.float32)  # noqa: E731
    return model, jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def _prompts(batch=8):
    mask = np.arange(P)[None] >= np.arange(batch)[:, None] % P
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (batch, P))), jnp.asarray(mask)


def _sample(model_and_params, seed=0, batch=8, **settings):
    return generate(
        *model_and_params, *_prompts(batch), jax.random.key(seed), **({"max_new_tokens": R} | settings)
    )


def _assert_same(samples, others):
    """The same tokens; log-probs as far as float32 sums in another order allow."""
    np.testing.assert_array_equal(samples.tokens, others.tokens)
    np.testing.assert_array_equal(samples.action_mask, others.action_mask)
    np.testing.assert_allclose(samples.log_probs, others.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.7}, {}, {"temperature": 1.3}, {"temperature": 1.3, "top_k": 6, "top_p": 0.9}],
    ids=str,
)
def test_log_probs_are_those_of_reading_the_whole_sequence_again(model_and_params, settings):
    model, params = model_and_params
    tokens, mask = _prompts()
    samples = _sample(model_and_params, eos_ids=(3, 4, 5, 6), **settings)
    everything = jnp.concatenate([tokens, samples.tokens], 1)
    attention_mask = jnp.concatenate([mask, samples.action_mask], 1)
    logits = jax.jit(model.apply)(params, everything, attention_mask).logits[:, P - 1 : -1]
    log_probs = jax.nn.log_softmax(sampling_logits(logits, **settings))
    expected = np.take_along_axis(np.asarray(log_probs), np.asarray(samples.tokens)[..., None], 2)[..., 0]
    kept = np.asarray(samples.action_mask)
    np.testing.assert_allclose(np.asarray(samples.log_probs)[kept], expected[kept], atol=1e-4)
    assert "top_k" in settings or not kept.all()  # some row ended early


def test_the_end_is_sampled_and_kept_and_nothing_follows_it(model_and_params):
    samples = _sample(model_and_params, eos_ids=(3, 4))
    free = _sample(model_and_params)  # the same noise without an end
    ended = 0
    for row in range(8):
        ends = np.flatnonzero(np.isin(free.tokens[row], (3, 4)))
        length = ends[0] + 1 if len(ends) else R
        ended += len(ends) > 0
        np.testing.assert_array_equal(samples.action_mask[row], np.arange(R) < length)
        np.testing.assert_array_equal(samples.tokens[row, :length], free.tokens[row, :length])
        assert not np.any(samples.tokens[row, length:])
        assert not np.any(samples.log_probs[row, length:])
    assert 0 < ended < 8


def test_decoding_stops_when_every_row_has_ended(model_and_params):
    """Counts the steps of the model: with every token an end there is none behind the prefill."""
    model, params = model_and_params
    steps = []

    class Counting(type(model)):
        def step(self, params, token, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().step(params, token, cache)

    counting = Counting(model.config)
    _ = generate(counting, params, *_prompts(), jax.random.key(0), max_new_tokens=R, eos_ids=range(VOCAB))
    jax.effects_barrier()
    assert len(steps) == 0
    samples = generate(counting, params, *_prompts(), jax.random.key(0), max_new_tokens=R, eos_ids=range(20))
    jax.effects_barrier()
    assert len(steps) == int(np.max(np.sum(samples.action_mask, 1))) - 1 < R - 1


def test_the_last_token_may_fill_the_model_and_one_more_is_an_error(model_and_params):
    assert _sample(model_and_params, max_new_tokens=24).tokens.shape == (8, 24)
    with pytest.raises(
        UserError, match=r"max_new_tokens must be at most 24 \(prompts of 8 tokens, max_length 32\)"
    ):
        _sample(model_and_params, max_new_tokens=25)
    assert _sample(model_and_params, max_new_tokens=1).tokens.shape == (8, 1)


def test_rows_and_steps_never_share_noise(model_and_params):
    """With the weights at 0 every token is as likely: equal noise would show as equal tokens."""
    model, params = model_and_params
    flat = jax.tree.map(jnp.zeros_like, params)
    tokens, mask = _prompts(64)
    samples = np.asarray(generate(model, flat, tokens, mask, jax.random.key(0), max_new_tokens=R).tokens)
    for view in (samples, samples.T):  # rows, then steps
        for i in range(len(view)):
            same = np.mean(view[i + 1 :] == view[i]) if i + 1 < len(view) else 0.0
            assert same < 0.4  # chance is 1/29
    counts = np.bincount(samples.ravel(), minlength=VOCAB)
    assert counts.min() >= 8  # 768 draws, 26 expected each
    other = np.asarray(generate(model, flat, tokens, mask, jax.random.key(1), max_new_tokens=R).tokens)
    assert np.mean(other == samples) < 0.1


def test_a_response_depends_neither_on_the_rows_beside_it_nor_on_the_length_allowed(model_and_params):
    samples = _sample(model_and_params)
    few = generate(
        *model_and_params, *(x[:3] for x in _prompts()), jax.random.key(0), max_new_tokens=R, eos_ids=()
    )
    np.testing.assert_array_equal(few.tokens, samples.tokens[:3])
    short = _sample(model_and_params, max_new_tokens=5)
    np.testing.assert_array_equal(short.tokens, samples.tokens[:, :5])


def test_eight_devices_draw_the_samples_of_one(model_and_params):
    model, params = model_and_params
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, copies = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    tokens, mask = jax.device_put(_prompts(16), rows)
    for settings in ({"temperature": 1.3}, {"top_k": 5, "top_p": 0.9}):
        split = generate(
            model, jax.device_put(params, copies), tokens, mask, jax.device_put(jax.random.key(0), copies),
            max_new_tokens=R, eos_ids=(3,), **settings,
        )  # fmt: skip
        whole = _sample(model_and_params, batch=16, eos_ids=(3,), **settings)
        np.testing.assert_array_equal(split.tokens, whole.tokens)
        np.testing.assert_array_equal(split.action_mask, whole.action_mask)
        np.testing.assert_allclose(split.log_probs, whole.log_probs, atol=1e-5)


def test_greedy_takes_the_most_likely_token_at_every_step(model_and_params):
    model, params = model_and_params
    tokens, mask = _prompts()
    samples = _sample(model_and_params, temperature=0.0)
    everything = jnp.concatenate([tokens, samples.tokens], 1)
    attention_mask = jnp.concatenate([mask, samples.action_mask], 1)
    logits = jax.jit(model.apply)(params, everything, attention_mask).logits[:, P - 1 : -1]
    np.testing.assert_array_equal(samples.tokens, np.argmax(logits, -1))
    assert not np.any(samples.log_probs)


@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_cache_that_grows_gives_the_samples_of_a_whole_one(scan_layers, monkeypatch):
    """Windows, slopes and rotary positions all depend on where a token lies."""
    config = DecoderConfig(
        num_layers=2, width=16, num_heads=2, num_kv_heads=1, max_length=32, position="alibi", window=5,
        execution=Execution(scan_layers=scan_layers),
    )  # fmt: skip
    model = config.build(VOCAB)
    # Opinions, and yet a rounding moves no log-prob by more than 3e-6; with ten times the weights by 3e-4.
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    whole = _sample((model, params), eos_ids=(3,))
    monkeypatch.setattr(ancestral, "cache_lengths", lambda *_: (P + 2, P + 5, P + R - 1))
    _assert_same(_sample((model, params), eos_ids=(3,)), whole)


def test_only_on_an_accelerator_does_a_long_cache_grow(model_and_params, monkeypatch):
    model, _ = model_and_params
    assert cache_lengths(model, 8, 1000) == (1007,)
    monkeypatch.setattr(ancestral, "target_platform", lambda: "tpu")
    assert cache_lengths(model, 8, 1000) == (257, 507, 757, 1007)
    assert cache_lengths(model, 8, 130) == (72, 137)
    assert cache_lengths(model, 8, 64) == (71,)
    assert cache_lengths(model, 8, 1) == (8,)


def test_weights_cast_once_give_the_samples_of_weights_cast_at_every_token():
    class Uncast(Decoder):
        def cast(self, params):
            return params

    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=32, dtype="bfloat16").build(VOCAB)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    assert model.cast(params)["token_embedding"]["embedding"].dtype == jnp.bfloat16
    _assert_same(_sample((model, params)), _sample((Uncast(model.config), params)))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_cache_is_written_in_place(scan_layers):
    """Beside the cache itself there is less than a quarter of it: no copy is carried through the loop."""
    config = DecoderConfig(
        num_layers=8, width=32, num_heads=2, max_length=1024, execution=Execution(scan_layers=scan_layers)
    )
    model, rows, length = config.build(VOCAB), 64, 512
    tokens = jax.ShapeDtypeStruct((rows, 4), jnp.int32)
    sample = jax.jit(lambda *inputs: generate(model, *inputs, max_new_tokens=length - 3, eos_ids=(3,)))
    compiled = sample.lower(
        jax.eval_shape(model.init, jax.random.key(0)), tokens, tokens, jax.random.key(0)
    ).compile()
    cache = 2 * config.num_layers * rows * length * config.width * 4
    assert cache <= compiled.memory_analysis().temp_size_in_bytes < 1.25 * cache


def test_sampling_can_be_vmapped_over_keys(model_and_params):
    model, params = model_and_params
    tokens, mask = _prompts(2)
    sample = lambda key: generate(model, params, tokens, mask, key, max_new_tokens=4, eos_ids=(3,))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(sample))(keys)
    for i in range(3):
        np.testing.assert_array_equal(together.tokens[i], sample(keys[i]).tokens)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"eos_ids": (29,)}, "eos_ids must be tokens below the vocabulary's 29, got 29"),
    ],
)
def test_impossible_settings_are_one_clear_line(model_and_params, setting, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        _sample(model_and_params, **setting)


def test_the_sampler_of_a_config_is_the_same_function(model_and_params):
    assert SAMPLERS["ancestral"] is Ancestral
    sampler = parse(SAMPLERS["ancestral"], {"max_new_tokens": R, "top_k": 5})
    samples = sampler(*model_and_params, *_prompts(), jax.random.key(0), eos_ids=(3,))
    expected = _sample(model_and_params, top_k=5, eos_ids=(3,))
    jax.tree.map(np.testing.assert_array_equal, samples, expected)
