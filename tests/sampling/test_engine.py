"""The engine as pure functions: under a scan, with rows that come and go, over a cache without slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.sampling.ancestral import Ancestral, generate
from hybrid_jax.sampling.base import sample
from hybrid_jax.sampling.engine import Engine
from hybrid_jax.sampling.logits import response_keys
from hybrid_jax.testing import PrefixTable

VOCAB, P, R, N = 29, 6, 8, 4
EOS = (3, 4, 5)


@pytest.fixture(scope="module")
def model_and_params():
    model = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=32).build(VOCAB)
    # Opinions, and yet a rounding moves no log-prob by more than 3e-6; with ten times the weights by 3e-4.
    return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))


def _prompts(rows=N):
    mask = np.arange(P)[None] >= np.arange(rows)[:, None] % P
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (rows, P))), jnp.asarray(mask)


def test_steps_under_a_scan_give_the_tokens_of_generate_bit_for_bit(model_and_params):
    model, params = model_and_params
    engine, key = Engine(model, EOS, R), jax.random.key(0)

    @jax.jit
    def run(params, tokens, mask, key):
        state = engine.init(N, P + R - 1)
        keys = response_keys(key, jnp.arange(N))
        state, first = engine.admit(params, state, jnp.arange(N)[None], tokens, mask, keys)
        state, finished = jax.lax.scan(lambda state, _: engine.step(params, state), state, length=R - 1)
        return engine.harvest(state), jnp.concatenate([first[None], finished])

    samples, finished = run(params, *_prompts(), key)
    expected = generate(model, params, *_prompts(), key, max_new_tokens=R, eos_ids=EOS)
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_array_equal(samples.action_mask, expected.action_mask)
    np.testing.assert_allclose(samples.log_probs, expected.log_probs, atol=1e-5)  # another program's sums
    lengths = np.sum(expected.action_mask, axis=1)
    assert 1 <= lengths.min() < R
    np.testing.assert_array_equal(np.asarray(finished).T, np.arange(1, R + 1) == lengths[:, None])


@pytest.mark.slow
def test_a_row_answers_by_its_prompt_and_its_key_whenever_it_is_admitted(model_and_params):
    model, params = model_and_params
    engine, (tokens, mask) = Engine(model, (), 4), _prompts()
    keys = response_keys(jax.random.key(0), jnp.arange(N))
    admit, step = jax.jit(engine.admit), jax.jit(engine.step)
    state, nowhere = engine.init(2, P + 4 - 1), 2
    state, _ = admit(params, state, jnp.array([[1, nowhere]]), tokens[:2], mask[:2], keys[:2])
    np.testing.assert_array_equal(state.rows.busy, [False, True])
    state, finished = step(params, state)
    np.testing.assert_array_equal(finished, [False, False])
    state, _ = admit(params, state, jnp.array([[0, nowhere]]), tokens[2:], mask[2:], keys[2:])
    for _ in range(3):
        state, _ = step(params, state)
    expected = generate(model, params, tokens, mask, jax.random.key(0), max_new_tokens=4)
    harvested = engine.harvest(state, jnp.array([[1, 0]]))
    np.testing.assert_array_equal(harvested.tokens, expected.tokens[jnp.array([0, 2])])
    np.testing.assert_allclose(harvested.log_probs, expected.log_probs[jnp.array([0, 2])], atol=1e-5)


def test_what_a_row_has_answered_before_is_not_in_its_next_response(model_and_params):
    model, params = model_and_params
    engine, (tokens, mask) = Engine(model, (), 3), _prompts(1)
    admit, keys = jax.jit(engine.admit), response_keys(jax.random.key(0), jnp.arange(1))
    state, row = engine.init(1, P + 3 - 1), jnp.array([[0]])
    state, _ = admit(params, state, row, tokens, mask, keys)
    state, _ = jax.jit(engine.step)(params, state)
    state, _ = admit(params, state, row, tokens, mask, keys)
    samples = engine.harvest(state)
    np.testing.assert_array_equal(samples.action_mask, [[True, False, False]])
    assert not np.any(samples.tokens[0, 1:])
    assert not np.any(samples.log_probs[0, 1:])


def test_a_cache_without_slots_serves_the_queue():
    model = PrefixTable()
    params = model.init(jax.random.key(0))
    prompts = jnp.zeros((9, 1), jnp.int32), jnp.ones((9, 1), bool)
    plain, few = (
        sample(Ancestral(3, slots=slots), model, params, *prompts, jax.random.key(0), eos_ids=(2,))
        for slots in (None, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, few, plain)
    assert np.unique(plain.tokens, axis=0).shape[0] > 3


def test_a_sampler_of_anybody_must_give_one_response_of_the_right_length_a_prompt(model_and_params):
    class Short:
        max_new_tokens = 3

        def __call__(self, model, params, prompt_tokens, prompt_mask, key, *, eos_ids=()):
            return Samples.empty(len(prompt_tokens), 2)

    with pytest.raises(AssertionError, match=r"\(4, 2\)"):
        sample(Short(), *model_and_params, *_prompts(), jax.random.key(0))
    with pytest.raises(AssertionError, match="shape"):
        sample(Short(), *model_and_params, _prompts()[0], _prompts()[1][:, 1:], jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [({"temperature": 0.7}, 0.7), ({"temperature": 0.0}, None), ({"top_k": 5}, None), ({"top_p": 0.9}, None)],
    ids=str,
)
def test_a_policy_learns_only_from_samples_of_its_own_whole_distribution(settings, temperature):
    assert Ancestral(**settings).policy_temperature == temperature
