"""The operands of every matrix product, forward and backward, in programs lowered for accelerators."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms import log_probs
from hybrid_jax.models import layers
from hybrid_jax.models.attention import choice
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from hybrid_jax.models.execution import Execution
from hybrid_jax.models.experts import Experts
from hybrid_jax.models.heads import init_value_head, value
from hybrid_jax.models.layers import plain_linear, product
from hybrid_jax.models.lora import Lora

VOCABULARY = 19
KEY = jax.random.key(0)
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # compiled once, run once
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 0, VOCABULARY)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
GPT2 = DecoderConfig(num_layers=2, width=16, num_heads=4, max_length=24, dtype="bfloat16")
LLAMA = replace(GPT2, num_kv_heads=2, position="rotary", norm="rms", mlp="gated", tie_embeddings=False)
EXPERTS = Experts(count=4, per_token=2, width=8, balance_coef=0.1, shared_width=8, shared_gate=True)
DECODERS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": replace(LLAMA, attention_softcap=5.0, logit_softcap=3.0, norm_placement="around", window=4),
    "olmo2": replace(LLAMA, query_key_norm="all_heads", norm_placement="after", clip_qkv=2.0),
    "gpt_oss": replace(LLAMA, attention_sinks=True, experts=Experts(4, 2, 8, clamped=True, bias=True)),
    "qwen2_moe": replace(LLAMA, experts=EXPERTS),
    "bloom": replace(GPT2, position="alibi", embedding_norm=True, block="parallel"),
    "opt": replace(GPT2, embedding_width=8, position_offset=2),
    "adapters": replace(LLAMA, lora=Lora(rank=2, targets=r".*(query|value|up|lm_head)")),
    "scanned, dots saved": replace(LLAMA, execution=Execution(scan_layers=True, remat="dots")),
}


@pytest.fixture(params=["tpu", "cuda"])
def platform(request, monkeypatch):
    """Functions are traced as they are for this platform; attention is einsum, which kernels stand for."""
    name = {"cuda": "gpu"}.get(request.param, request.param)
    monkeypatch.setattr(layers, "target_platform", lambda: name)
    monkeypatch.setattr(choice, "target_platform", lambda: name)
    monkeypatch.setitem(choice._PREFERRED, name, "einsum")
    return request.param


def operands(function, platform, *arguments) -> list[tuple[str, str]]:
    """The types of both operands of every matrix product, with their sizes: ("3x9x16xbf16", "16x4xbf16")."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\) ->|(ragged_dot.*)", text)
    assert len(found) > 3
    return [
        (a, b) if not ragged else tuple(re.findall(r"tensor<(\S+?)>", ragged)[:2]) for a, b, ragged in found
    ]


def wide(pairs):
    return [pair for pair in pairs if not all(kind.endswith("xbf16") for kind in pair)]


def read(model):
    def loss(params):
        hidden, losses = model.hidden_and_losses(params, TOKENS, SEGMENTS)
        logits = model.logits(params, hidden)
        assert logits.dtype == jnp.float32
        return jnp.sum(jnp.sin(logits)) + sum(term.total for term in losses.values())

    return loss


@pytest.mark.parametrize("name", DECODERS)
def test_every_product_of_a_decoder_and_of_its_gradient_has_bfloat16_operands(name, platform):
    if platform == "tpu" and name != "llama":
        pytest.skip("what is lowered is the same: one for TPUs does")
    model = DECODERS[name].build(VOCABULARY)
    params = jax.eval_shape(model.init, KEY)
    gradient = jax.grad(read(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(gradient, params))} == {
        jnp.dtype(jnp.float32)
    }
    found = wide(operands(gradient, platform, params))
    # A token's experts are summed in float32, with their weights: 2 numbers a token and channel.
    sums = [pair for pair in found if "27x2xf32" in pair or "27x2x16xf32" in pair]
    assert found == sums
    assert bool(sums) == (model.config.experts is not None)


def test_only_the_norms_of_dora_are_products_in_float32(platform):
    model = replace(LLAMA, lora=Lora(rank=2, targets=r".*up", dora=True)).build(VOCABULARY)
    found = wide(operands(jax.grad(read(model)), platform, jax.eval_shape(model.init, KEY)))
    assert set(found) == {("16x2xf32", "2x64xf32")}  # A B, for the norm of W + s A B


def test_log_probs_in_stretches_keep_the_head_in_bfloat16(platform, monkeypatch):
    monkeypatch.setattr(log_probs, "MOST_LOGIT_BYTES", 2 * 4 * 3 * VOCABULARY)
    model = LLAMA.build(VOCABULARY)

    def loss(params):
        hidden = model.hidden(params, TOKENS, SEGMENTS)
        log_prob, entropy = log_probs.state_log_probs(
            lambda states: model.logits(params, states), hidden, TOKENS, VOCABULARY, with_entropy=True
        )
        assert log_prob.dtype == entropy.dtype == jnp.float32
        return jnp.sum(log_prob + entropy)

    found = operands(jax.grad(loss), platform, jax.eval_shape(model.init, KEY))
    assert wide(found) == []
    assert ("3x1x16xbf16", "16x19xbf16") in found  # a token of every row at a time


def test_a_value_head_alone_is_float32(platform):
    """One number a position: bound by memory, and values are float32."""

    def loss(params, hidden):
        return jnp.sum(jnp.square(value(params, hidden * jnp.bfloat16(2))))

    hidden = jax.ShapeDtypeStruct((3, 9, 16), jnp.bfloat16)
    head = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init_value_head(16))
    text = jax.jit(jax.grad(loss, (0, 1))).trace(head, hidden).lower(lowering_platforms=(platform,)).as_text()
    assert "bf16> -> tensor<3x9xbf16" not in text
    assert wide(re.findall(r"dot_general.* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)) != []


def test_every_product_of_an_encoder_and_of_its_gradient_has_bfloat16_operands(platform):
    model = Encoder(
        EncoderConfig(VOCABULARY, num_layers=2, width=16, num_heads=2, max_length=24, dtype="bfloat16")
    )

    def loss(params):
        return jnp.sum(jnp.sin(model.hidden(params, TOKENS, SEGMENTS > 0).astype(jnp.float32)))

    assert wide(operands(jax.grad(loss), platform, jax.eval_shape(model.init, KEY))) == []


@pytest.mark.parametrize("tied", [True, False])
def test_every_product_of_an_encoder_decoder_and_of_its_gradient_has_bfloat16_operands(platform, tied):
    config = EncoderDecoderConfig(
        num_layers=2, width=16, num_heads=2, vocab_size=VOCABULARY, tie_embeddings=tied, dtype="bfloat16"
    )
    model = config.build(VOCABULARY)
    assert isinstance(model, EncoderDecoder)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, TOKENS, jnp.ones_like(TOKENS)).logits))

    assert wide(operands(jax.grad(loss), platform, jax.eval_shape(model.init, KEY))) == []


def _arrays(dtype):
    shapes = ((3, 9, 16), (16, 12), (3, 9, 12))
    return [
        jax.random.normal(key, s).astype(dtype) for key, s in zip(jax.random.split(KEY, 3), shapes, strict=True)
    ]


def test_in_float32_every_bit_is_that_of_autodiff():
    x, kernel, dy = _arrays(jnp.float32)

    def results(function):
        out, pull_back = jax.vjp(function, x, kernel)
        return out, *pull_back(dy)

    expected = jax.jit(lambda: results(lambda x, k: jnp.matmul(x, k, preferred_element_type=jnp.float32)))()
    jax.tree.map(np.testing.assert_array_equal, expected, jax.jit(lambda: results(plain_linear))())


def test_a_gradient_in_bfloat16_is_off_by_the_rounding_of_the_cotangent_and_of_the_result():
    x, kernel, dy = _arrays(jnp.bfloat16)
    dy = dy.astype(jnp.float32) * 1.01  # no bfloat16 numbers
    _, pull_back = jax.vjp(lambda x, k: product("abi,io->abo", x, k), x, kernel)
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    exact = (np.einsum("abo,io->abi", dy, kernel), np.einsum("abo,abi->io", dy, x))
    sizes = (np.einsum("abo,io->abi", abs(dy), abs(kernel)), np.einsum("abo,abi->io", abs(dy), abs(x)))
    for got, right, size in zip(pull_back(jnp.asarray(dy, jnp.float32)), exact, sizes, strict=True):
        assert got.dtype == jnp.bfloat16
        off = np.abs(np.asarray(got, np.float64) - right)
        # Rounding to 8 bits is off by 2⁻⁸ at most; float32 sums of up to 27 terms add 27 · 2⁻²⁴ of their size.
        assert (off <= 2.0**-8 * (1 + 2.0**-8) * (size + np.abs(right)) + 27 * 2.0**-24 * size).all()
        assert off.max() > 2.0**-12 * np.abs(right).max()


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_the_gradients_of_a_whole_model_agree_with_float32(name, platform):
    if platform == "cuda":
        pytest.skip("the numbers are computed on a CPU, once")
    narrow = DECODERS[name].build(VOCABULARY)
    exact = replace(DECODERS[name], dtype="float32").build(VOCABULARY)
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, exact.init(KEY))
    gradients = [jax.jit(jax.grad(read(model)), compiler_options=FAST)(params) for model in (exact, narrow)]
    expected, got = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in gradients)
    # About 20 roundings a layer and direction lie between a parameter's gradient and the exact one, each off by
    # 2⁻⁸ at most: 80 in one direction would be off by 0.31, independent ones by √80 · 2⁻⁸ = 0.035.
    assert np.linalg.norm(got - expected) <= np.sqrt(80) * 2.0**-8 * np.linalg.norm(expected)


def test_saved_products_are_still_seen_by_the_policy_of_rematerialisation(platform):
    if platform == "cuda":
        pytest.skip("what is lowered is the same")

    def products(remat):
        model = replace(LLAMA, execution=Execution(remat=remat)).build(VOCABULARY)
        return len(operands(jax.grad(read(model)), platform, jax.eval_shape(model.init, KEY)))

    # "full" makes the 7 maps and 2 products of attention of each of 2 layers once more, but for the last map,
    # whose result nothing reads; "dots" only those of attention.
    none, dots, full = map(products, ("none", "dots", "full"))
    assert (dots - none, full - none) == (2 * 2, 2 * 8)
