"""Adapters on our own models: the formula, merging, what they may lie on, dropout."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.blocks import Linear
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.lora import ADAPTER, ALL_MAPS, Lora, add_adapter, merge, split, targeted, whole

VOCAB = 23
SMALL = {"num_layers": 1, "width": 16, "num_heads": 4, "max_length": 32}
LLAMA = DecoderConfig(
    **SMALL, num_kv_heads=2, position="rotary", norm="rms", mlp="gated", tie_embeddings=False, head_bias=True
)
NARROW = DecoderConfig(**SMALL, embedding_width=8)  # with maps into the width and back
EXPERTS = DecoderConfig(**SMALL, mlp="gated", experts=Experts(4, 2, 8, shared_width=12, shared_gate=True))


# These tests are about numbers, not speed: the compiler may skip its expensive passes.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def built(config, **settings):
    """A model whose adapters do something, and its parameters."""
    model, draw = replace(config, lora=Lora(**settings)).build(VOCAB), np.random.default_rng(0).normal
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: jnp.asarray(draw(0.1, 0.3, x.shape), jnp.float32), shapes)


def fast(function):
    return jax.jit(function, compiler_options=FAST_COMPILE)


def tokens(*shape):
    return jax.random.randint(jax.random.key(2), shape, 0, VOCAB)


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_map_with_an_adapter_is_its_formula(rank_stabilized, dora):
    draw = np.random.default_rng(0).normal
    x, w, b, a = draw(size=(5, 6)), draw(size=(6, 7)), draw(size=7), draw(size=(6, 4))
    up, m = draw(size=(4, 7)), draw(size=7)
    scale = 10 / 2 if rank_stabilized else 10 / 4
    if dora:
        turned = w + scale * a @ up
        expected = x @ (m * turned / np.sqrt((turned**2).sum(0))) + b
    else:
        expected = x @ w + b + scale * (x @ a) @ up
    lora = Lora(rank=4, alpha=10, rank_stabilized=rank_stabilized, dora=dora)
    adapter = {"a": a, "b": up, **({"magnitude": m} if dora else {})}
    variables = {"params": {"kernel": w, "bias": b}, ADAPTER: adapter}
    variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), variables)
    y = Linear(7, True, 0.02, "float32", lora=lora).apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_no_bit_and_a_fresh_magnitude_only_rounding(dora):
    bare = LLAMA.build(VOCAB)
    params = bare.init(jax.random.key(0))
    model = replace(LLAMA, lora=Lora(rank=3, dora=dora, targets=ALL_MAPS + "|lm_head")).build(VOCAB)
    trained, base = split(model.init(jax.random.key(0)))
    assert jax.tree.all(jax.tree.map(np.array_equal, base, params))
    assert set(trained) == {ADAPTER}
    models = {bare: params, model: whole(base, trained)}
    expected, logits = fast(
        lambda *trees: [m.apply(t, tokens(2, 9)).logits for m, t in zip(models, trees, strict=True)]
    )(*models.values())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 if dora else 0)


def test_a_fresh_a_is_uniform_and_a_fresh_b_zero():
    params = {"map": {"kernel": jnp.ones((400, 50))}, "other": {"kernel": jnp.ones((400, 50))}}
    adapter = add_adapter(Lora(rank=8, targets="map|other"), params, jax.random.key(0))[ADAPTER]
    a = np.asarray(adapter["map"]["a"])
    assert np.abs(a).max() == pytest.approx(1 / 20, rel=1e-2)
    assert np.abs(a).max() <= 1 / 20
    assert a.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)  # 3200 draws
    assert not np.any(adapter["map"]["b"])
    assert not np.array_equal(a, adapter["other"]["a"])


CASES = {
    "all maps and the head": (LLAMA, {"targets": ALL_MAPS + "|lm_head", "rank_stabilized": True}),
    "dora": (LLAMA, {"targets": ALL_MAPS + "|lm_head", "dora": True}),
    "narrow embedding": (NARROW, {"targets": "embedding_(in|out)|layer_0/mlp/down"}),
    "experts": (EXPERTS, {"targets": r".*(query|router|shared_gate|shared/up)"}),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("all maps and the head", marks=pytest.mark.slow),  # as with "dora", but for its magnitudes
        *(case for case in CASES if case != "all maps and the head"),
    ],
)
def test_merged_maps_do_what_base_and_adapter_do_and_cached_decoding_too(case):
    config, settings = CASES[case]
    model, params = built(config, rank=3, **settings)
    bare = replace(config, lora=None).build(VOCAB)
    read = tokens(2, 9)

    def all_ways(params):
        merged = merge(model.config.lora, params)
        first, cache = model.prefill(params, read[:, :8], jnp.ones((2, 8), bool), model.init_cache(2, 9))
        second, _ = model.step(params, read[:, 8], cache)
        whole_pass = model.apply(params, read).logits
        alone, together = (bare.apply(tree, read).logits for tree in (split(params)[1], merged))
        return whole_pass, alone, together, jnp.stack([first, second], 1), merged

    logits, alone, together, decoded, merged = fast(all_ways)(params)
    assert jax.tree.structure(merged) == jax.tree.structure(split(params)[1])
    largest = np.abs(logits).max()
    assert np.abs(logits - alone).max() > 0.01 * largest
    np.testing.assert_allclose(together, logits, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(decoded, logits[:, 7:], rtol=0, atol=1e-5 * largest)


def test_targets_are_whole_paths_of_linear_maps():
    params = jax.eval_shape(replace(LLAMA, num_layers=2).build(VOCAB).init, jax.random.key(0))
    attention = [
        f"layer_{i}/attention/{name}" for i in range(2) for name in ("key", "output", "query", "value")
    ]
    mlp = [f"layer_{i}/mlp/{name}" for i in range(2) for name in ("down", "gate", "up")]
    assert sorted(targeted(Lora(), params)) == sorted(attention + mlp)
    some = Lora(targets=r"layer_1/attention/(query|value)|lm_head")
    assert sorted(targeted(some, params)) == ["layer_1/attention/query", "layer_1/attention/value", "lm_head"]


def test_the_adapters_of_llama_8b_have_the_published_number_of_parameters():
    sizes = {"width": 4096, "num_heads": 32, "num_kv_heads": 8, "mlp_width": 14336, "max_length": 8}
    llama = replace(LLAMA, num_layers=1, **sizes)
    counts = {}
    for name, lora in {"r8": Lora(rank=8), "r16": Lora(rank=16, targets=".*/(query|value)")}.items():
        params = jax.eval_shape(replace(llama, lora=lora).build(VOCAB).init, jax.random.key(0))
        counts[name] = 32 * sum(leaf.size for leaf in jax.tree.leaves(split(params)[0]))
    assert counts == {"r8": 20_971_520, "r16": 6_815_744}  # as `peft` counts them for Llama-3-8B


@pytest.mark.parametrize(
    ("config", "targets", "message"),
    [
        (LLAMA, "query", "must match linear maps such as layer_0/attention/key, .* got 'query'"),
        (LLAMA, ".*norm", r"'\.\*norm' matches 'final_norm', which is no single linear map"),
        (LLAMA, ".*", "which is no single linear map"),
        (NARROW, "lm_head|.*/query|token_embedding", "matches 'token_embedding', which is no single"),
        (EXPERTS, ".*/mlp/.*", "matches 'layer_0/mlp/expert_down', which is no single linear map"),
    ],
)
def test_what_is_no_linear_map_has_no_adapter(config, targets, message):
    model = replace(config, lora=Lora(targets=targets)).build(VOCAB)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be in \\[1, 1048576\\], got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": "("}, r"targets must be a regular expression .*, got '\('"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_an_adapter_in_a_folder_needs_its_base():
    with pytest.raises(UserError, match=r"lora\.path needs the model that it was trained on"):
        DecoderConfig(**SMALL, lora=Lora(path="somewhere")).build(VOCAB)


def test_dropout_acts_on_the_adapter_alone_only_with_a_key_and_its_mean_is_no_dropout():
    lora = Lora(rank=4, alpha=8, dropout=0.25)
    draw = np.random.default_rng(0).normal
    adapter = {"a": draw(size=(6, 4)), "b": draw(size=(4, 7))}
    variables = {"params": {"kernel": draw(size=(6, 7))}, ADAPTER: adapter}
    variables = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), variables)
    x = jnp.asarray(draw(size=(1, 6)), jnp.float32)
    read = partial(Linear(7, False, 0.02, "float32", lora=lora).apply, variables)
    without = read(x)
    np.testing.assert_array_equal(without, read(x))
    rows = 40_000
    dropped = read(jnp.repeat(x, rows, 0), rngs={"dropout": jax.random.key(3)})
    inputs, outputs = (
        np.asarray(x)[0],
        np.asarray(lora.scale * variables[ADAPTER]["a"] @ variables[ADAPTER]["b"]),
    )
    # y = base + Σ_i d_i x_i (AB)_i with d_i = 4/3 or 0: its variance is Σ_i x_i² (AB)_i² · p/(1 − p)
    std = np.sqrt((inputs[:, None] ** 2 * outputs**2).sum(0) / 3)
    np.testing.assert_allclose(dropped.std(0), std, rtol=0.02)
    assert np.all(np.abs(dropped.mean(0) - without[0]) < 4.5 * std / rows**0.5)
    # where all inputs of A are dropped (1 of 4096 rows), the base is left
    assert np.abs(dropped - x @ variables["params"]["kernel"]).max(1).min() < 1e-5
