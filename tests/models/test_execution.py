"""How a decoder is computed changes none of its numbers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.decoder import Decoder, DecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.lora import Lora
from hybrid_jax.models.stacking import stack_layers, unstack_layers
from hybrid_jax.sampling.ancestral import generate

BASE = DecoderConfig(num_layers=4, width=16, num_heads=4, num_kv_heads=2, max_length=24, vocab_size=19)
LLAMA = replace(BASE, position="rotary", norm="rms", mlp="gated", mlp_width=24, tie_embeddings=False)
CONFIGS = {
    "gpt2": replace(BASE, num_layers=2),
    "every second layer windowed": replace(LLAMA, window=3, window_layers=(True, False) * 2),
    "experts": replace(LLAMA, num_layers=2, experts=Experts(count=4, per_token=2, width=8, balance_coef=0.1)),
    "adapters": replace(LLAMA, num_layers=2, lora=Lora(rank=2)),
}
SCANNED = Execution(scan_layers=True)


def drawn(model):
    return jax.device_get(model.init(KEY))


def both(config: DecoderConfig, execution: Execution):
    plain, other = Decoder(config), Decoder(replace(config, execution=execution))
    params = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size)).reshape(x.shape), drawn(plain))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return plain, params, other, jax.jit(other.arranged)(params)


KEY = jax.random.key(0)
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 0, 19)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # many compilations


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def loss_and_gradients(model, params):
    def loss(params):
        hidden, losses = model.hidden_and_losses(params, TOKENS, SEGMENTS)
        logits = model.logits(params, hidden)
        return jnp.sum(jnp.sin(logits)) + sum(term.total for term in losses.values())

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(
    "name",
    [
        "every second layer windowed",
        pytest.param("experts", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("adapters", marks=pytest.mark.slow),
    ],
)
def test_a_scan_over_the_stack_gives_the_loss_and_the_gradients_of_the_list(name):
    plain, params, scanned, stacked = both(CONFIGS[name], SCANNED)
    (loss, grads), (same, stacked_grads) = (
        loss_and_gradients(plain, params),
        loss_and_gradients(scanned, stacked),
    )
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * largest),
        grads,
        jax.jit(scanned.listed)(stacked_grads),
    )


@pytest.mark.parametrize("name", ["every second layer windowed"])
def test_a_scanned_decoder_samples_the_same_tokens_from_its_cache(name):
    plain, params, scanned, stacked = both(CONFIGS[name], SCANNED)
    prompt, mask = TOKENS[:, :4], jnp.array([[False, True, True, True], [True] * 4, [False] * 3 + [True]])
    ours = generate(plain, params, prompt, mask, KEY, max_new_tokens=8)
    theirs = generate(scanned, stacked, prompt, mask, KEY, max_new_tokens=8)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-5)


@pytest.mark.parametrize(("remat", "scan_layers"), [("full", True), ("dots", False), ("named", True)])
def test_recomputing_gives_the_same_gradients(remat, scan_layers):
    execution = Execution(scan_layers=scan_layers)
    _, _, saving, params = both(CONFIGS["every second layer windowed"], execution)
    recomputing = Decoder(replace(saving.config, execution=replace(execution, remat=remat)))
    expected, got = loss_and_gradients(saving, params), loss_and_gradients(recomputing, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, got)


def test_recomputing_everything_saves_less_than_recomputing_nothing():
    config = replace(LLAMA, num_layers=8, width=64, mlp_width=256)
    temporaries = {}
    for remat in ("none", "full"):
        model = Decoder(replace(config, execution=Execution(scan_layers=True, remat=remat)))
        params = jax.eval_shape(model.init, KEY)
        compiled = loss_and_gradients.lower(model, params).compile()
        temporaries[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries["full"] < 0.6 * temporaries["none"], temporaries


@pytest.mark.parametrize(("dtype", "name"), [("float16", "experts"), ("bfloat16", "adapters")])
def test_cast_parameters_compute_the_same_bits_in_half_the_memory(dtype, name):
    model = Decoder(replace(CONFIGS[name], dtype=dtype))
    params = model.init(KEY)
    logits = jax.jit(lambda params: model.apply(params, TOKENS, SEGMENTS).logits)
    small = model.cast(params)
    np.testing.assert_array_equal(logits(params), logits(small))
    assert small["layer_0"]["attention"]["query"]["kernel"].dtype == dtype
    assert small["final_norm"]["scale"].dtype == jnp.float32


def test_the_magnitudes_of_dora_are_read_in_float32_so_its_base_is_not_cast():
    model = Decoder(replace(LLAMA, dtype="bfloat16", lora=Lora(rank=2, dora=True)))
    params = model.init(KEY)
    assert model.cast(params) is params


@pytest.mark.parametrize(
    ("windows", "layers", "period"),
    [
        ((True, False) * 3, 6, 2),
        ((True, True, False) * 2, 6, 3),
        ((True, False, False, True, True), 5, 5),
        (None, 6, 1),
    ],
)
def test_the_period_is_the_shortest_pattern_of_layers(windows, layers, period):
    assert (
        replace(LLAMA, num_layers=layers, window=3 if windows else None, window_layers=windows).period == period
    )


def test_layers_are_stacked_in_order_and_come_back_as_they_were():
    params = {"head": 7, **{f"layer_{i}": {"a": jnp.array([i, 10 * i])} for i in range(6)}}
    stacked = stack_layers(params, 2)
    assert stacked["layers"]["layer_1"]["a"].tolist() == [[1, 10], [3, 30], [5, 50]]
    back = unstack_layers(stacked, 2)
    assert {k: v["a"].tolist() for k, v in back.items() if k != "head"} == {
        f"layer_{i}": [i, 10 * i] for i in range(6)
    }
    assert back["head"] == stacked["head"] == 7


def test_shapes_are_stacked_like_arrays():
    model = Decoder(replace(CONFIGS["adapters"], execution=SCANNED))
    shapes = jax.eval_shape(model.as_list().init, KEY)
    assert jax.tree.map(lambda x: x.shape, model.arranged(shapes)) == jax.tree.map(
        lambda x: x.shape, jax.eval_shape(model.init, KEY)
    )


def test_adapters_on_some_layers_cannot_be_scanned():
    lora = Lora(rank=2, targets=r"layer_[02]/attention/query")
    with pytest.raises(UserError, match="adapters on all layers alike"):
        Decoder(replace(LLAMA, lora=lora, execution=SCANNED)).init(KEY)
