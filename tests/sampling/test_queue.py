"""Many prompts in few slots: the samples of plain sampling, whatever the slots."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder_decoder import EncoderDecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.parallel.mesh import MeshConfig, put_rows
from hybrid_jax.parallel.rules import ROLLOUTS, under
from hybrid_jax.sampling.ancestral import Ancestral

VOCAB, P, R, N = 29, 8, 12, 16
EOS = (3, 4, 5, 6, 7)
CONFIGS = {
    "window": {"position": "rotary", "window": 5, "num_kv_heads": 1},
    "alibi": {"num_layers": 2, "position": "alibi", "execution": Execution(scan_layers=True)},
}


def _model(**settings):
    config = {"num_layers": 1, "width": 16, "num_heads": 2, "max_length": 32} | settings
    model = DecoderConfig(**config).build(VOCAB)
    # Opinions, and yet a rounding moves no log-prob by more than 3e-6; with ten times the weights by 3e-4.
    return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))


def _prompts(rows=N):
    mask = np.arange(P)[None] >= np.arange(rows)[:, None] % P
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (rows, P))), jnp.asarray(mask)


@pytest.fixture(scope="module")
def model_and_params():
    return _model()


def _sample(model_and_params, rows=N, eos_ids=EOS, **settings):
    sampler = Ancestral(**({"max_new_tokens": R} | settings))
    return sampler(*model_and_params, *_prompts(rows), jax.random.key(0), eos_ids=eos_ids)


def _assert_same(samples, others):
    """The same tokens; log-probs as far as float32 sums in another order allow."""
    np.testing.assert_array_equal(samples.tokens, others.tokens)
    np.testing.assert_array_equal(samples.action_mask, others.action_mask)
    np.testing.assert_allclose(samples.log_probs, others.log_probs, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_prompt_gets_the_response_of_plain_sampling(name):
    model_and_params = _model(**CONFIGS[name])
    plain = _sample(model_and_params)
    lengths = np.sum(plain.action_mask, axis=1)
    assert lengths.min() < R / 2 < lengths.max() == R
    _assert_same(_sample(model_and_params, slots=3), plain)


@pytest.mark.parametrize(
    ("rows", "slots", "settings"),
    [
        (5, 1, {"eos_ids": ()}),  # every response as long as it may be
        (5, 4, {"max_new_tokens": 1}),
        pytest.param(37, 16, {"top_k": 5, "temperature": 0.7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_number_of_slots_changes_no_response(model_and_params, rows, slots, settings):
    _assert_same(
        _sample(model_and_params, rows, slots=slots, **settings), _sample(model_and_params, rows, **settings)
    )


def test_log_probs_are_those_of_reading_the_whole_sequence_again(model_and_params):
    model, params = model_and_params
    tokens, mask = _prompts()
    samples = _sample(model_and_params, slots=4)
    everything = jnp.concatenate([tokens, samples.tokens], 1)
    logits = jax.jit(model.apply)(params, everything, jnp.concatenate([mask, samples.action_mask], 1)).logits
    log_probs = np.asarray(jax.nn.log_softmax(logits[:, P - 1 : -1]))
    expected = np.take_along_axis(log_probs, np.asarray(samples.tokens)[..., None], 2)[..., 0]
    kept = np.asarray(samples.action_mask)
    np.testing.assert_allclose(np.asarray(samples.log_probs)[kept], expected[kept], atol=1e-4)


def test_slots_stay_busy(model_and_params):
    """Against batches of as many rows as there are slots, each of which waits for its longest response."""
    model, params = model_and_params
    steps, reads = [], []

    class Counting(type(model)):
        def step(self, params, token, cache):
            jax.debug.callback(lambda: steps.append(1))
            return super().step(params, token, cache)

        def prefill(self, params, tokens, attention_mask, cache):
            jax.debug.callback(lambda: reads.append(len(tokens)))
            return super().prefill(params, tokens, attention_mask, cache)

    samples = _sample((Counting(model.config), params), rows=64, slots=8)
    jax.effects_barrier()
    lengths = np.sum(samples.action_mask, axis=1)
    batches = sum(max(lengths[i : i + 8]) - 1 for i in range(0, 64, 8))
    assert sum(reads) == 64  # a prompt is read once, at the price of one
    assert np.sum(lengths - 1) / 8 <= len(steps) < 0.8 * batches


def test_eight_devices_answer_in_groups_and_move_no_rows():
    """Each has all weights and answers prompts of its own; they tell each other only how many slots wait."""
    model, params = _model(max_length=64)
    tokens, mask = _prompts(32)
    sampler, mesh = Ancestral(R, slots=16), MeshConfig(data=2, fsdp=2, tensor=2)
    placement = mesh.placement().with_rules(ROLLOUTS["replicated"])
    sample = under(placement, lambda *inputs: sampler(model, *inputs, eos_ids=EOS))
    rows = lambda x: put_rows(placement, x)  # noqa: E731
    whole = lambda x: jax.device_put(x, placement.sharding((), ()))  # noqa: E731
    inputs = (whole(params), rows(tokens), rows(mask), whole(jax.random.key(0)))
    compiled = jax.jit(sample).lower(*inputs).compile()
    _assert_same(compiled(*inputs), _sample((model, params), 32))
    text = compiled.as_text()
    assert not re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", text)
    summed = " ".join(re.findall(r"= (.*) all-reduce(?:-start)?\(", text))
    assert summed
    assert not re.search(r"\[\d", summed)  # scalars alone


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_ring_is_written_in_place(scan_layers):
    """Beside the cache there are the rows that are read anew, and no copy of the cache."""
    model, _ = _model(num_layers=4, width=32, max_length=1024, execution=Execution(scan_layers=scan_layers))
    tokens, key = jax.ShapeDtypeStruct((256, 4), jnp.int32), jax.random.key(0)
    sampler = Ancestral(509, slots=64)
    sample = jax.jit(lambda *inputs: sampler(model, *inputs, eos_ids=EOS))
    compiled = sample.lower(jax.eval_shape(model.init, key), tokens, tokens, key).compile()
    cache = 2 * 4 * 64 * 512 * 32 * 4
    assert cache <= compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache


def test_a_model_without_slots_and_no_slots_are_clear_errors():
    with pytest.raises(ValueError, match="slots must be in \\[1, 1048576\\], got 0"):
        Ancestral(slots=0)
    model = EncoderDecoderConfig(num_layers=1, width=16, num_heads=2).build(VOCAB)
    with pytest.raises(UserError, match=r"sampler\.slots needs a model whose cache takes new rows"):
        _sample((model, model.init(jax.random.key(0))), slots=2)
