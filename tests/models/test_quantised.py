"""Quantised weights: numbers by the definitions of the formats, and a folder as transformers reads it."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained
from hybrid_jax.models.folders.quantised import unpacker

RANDOM = np.random.default_rng(0)


def _unpacked(settings, tensors, name="m.weight"):
    read = unpacker(settings)({key: (lambda value=value: value) for key, value in tensors.items()})
    assert read.keys() == {name, "m.bias"}
    return np.asarray(read[name]())


BIAS = {"m.bias": np.zeros(1, np.float32)}


# ------------------------------------------------------------------------------------------------ fp8


@pytest.mark.parametrize("shape", [(5, 7), (4, 8), (3, 5, 7)])
def test_float8_is_multiplied_by_the_scale_of_its_block_also_at_the_edges(shape):
    weight = RANDOM.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = RANDOM.uniform(0.5, 2, (*shape[:-2], -(-shape[-2] // 2), -(-shape[-1] // 3))).astype(np.float32)
    expected = np.zeros(shape, np.float32)
    for index in np.ndindex(*shape):
        *rest, i, j = index
        expected[index] = np.float32(weight[index]) * scale[(*rest, i // 2, j // 3)]
    settings = {"quant_method": "fp8", "weight_block_size": [2, 3]}
    got = _unpacked(settings, {"m.weight": weight, "m.weight_scale_inv": scale, **BIAS})
    np.testing.assert_array_equal(got, expected)


def test_float8_equals_what_transformers_makes_of_it():
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.5
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32).numpy()
    ours = {"m.weight": weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    got = _unpacked(settings, {**ours, "m.weight_scale_inv": scale.numpy(), **BIAS})
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("scale", [np.float32(0.25), np.array([0.25]), np.array([[0.5], [2.0]])])
def test_one_scale_of_all_and_one_of_each_output(scale):
    weight = np.array([[1, 2, -4], [0.5, 0, 8]], ml_dtypes.float8_e4m3fn)
    expected = np.array([[1, 2, -4], [0.5, 0, 8]]) * scale
    for settings, name in (
        ({"quant_method": "fp8", "weight_block_size": None}, "m.weight_scale_inv"),
        ({"quant_method": "fbgemm_fp8"}, "m.weight_scale"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "m.weight_scale"),
    ):
        tensors = {"m.weight": weight, name: np.asarray(scale, np.float32), "m.input_scale": np.ones(1), **BIAS}
        np.testing.assert_array_equal(_unpacked(settings, tensors), expected)


# ------------------------------------------------------------------------------------------------ integers


def _packed(numbers, bits, order=None):
    """int32 [N, M · bits / 32] of numbers [N, M]; the k-th field holds the column ``order[k]`` of its group."""
    each = 32 // bits
    packed = np.zeros((numbers.shape[0], numbers.shape[1] // each), np.uint32)
    for i, row in enumerate(numbers):
        for group in range(len(row) // each):
            for k in range(each):
                value = int(row[group * each + (k if order is None else order[k])])
                packed[i, group] |= np.uint32(value << (bits * k))
    return packed.view(np.int32)


def _affine(bits, groups, inputs=16, outputs=8):
    """(numbers [I, O], zeros [G, O], scales [G, O], the weight that they stand for [O, I])"""
    count = max(groups) + 1
    numbers = RANDOM.integers(0, 2**bits, (inputs, outputs))
    zeros = RANDOM.integers(0, 2**bits, (count, outputs))
    scales = RANDOM.uniform(0.5, 1, (count, outputs)).astype(np.float16)
    weight = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        for o in range(outputs):
            weight[o, i] = np.float32(scales[groups[i], o]) * np.float32(numbers[i, o] - zeros[groups[i], o])
    return numbers, zeros, scales, weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", ["neighbours", "by activations"])
def test_gptq_is_scale_times_number_minus_zero_which_version_1_stores_less_one(bits, version, order):
    groups = [i // 8 for i in range(16)] if order == "neighbours" else RANDOM.permutation([0, 1] * 8).tolist()
    numbers, zeros, scales, expected = _affine(bits, groups)
    stored = (zeros - 1) % 2**bits if version == "gptq" else zeros
    tensors = {
        "m.qweight": np.ascontiguousarray(_packed(numbers.T, bits).T),
        "m.qzeros": _packed(stored, bits),
        "m.scales": scales,
        **({} if order == "neighbours" else {"m.g_idx": np.array(groups, np.int32)}),
    }
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    np.testing.assert_array_equal(_unpacked(settings, {**tensors, **BIAS}), expected)


def test_awq_packs_outputs_in_its_own_order():
    numbers, zeros, scales, expected = _affine(4, [i // 8 for i in range(16)])
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {
        "m.qweight": _packed(numbers, 4, order),
        "m.qzeros": _packed(zeros, 4, order),
        "m.scales": scales,
    }
    settings = {"quant_method": "awq", "bits": 4, "version": "gemm"}
    np.testing.assert_array_equal(_unpacked(settings, {**tensors, **BIAS}), expected)


# ------------------------------------------------------------------------------------------------ bitsandbytes


def _state(**facts):
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def test_four_bits_of_bitsandbytes_are_a_table_times_the_maximum_of_their_block():
    table = np.linspace(-1, 1, 16).astype(np.float32)
    numbers = RANDOM.integers(0, 16, 24)  # three blocks of 8, two numbers a byte, the upper half first
    absmax = np.array([0.5, 1.0, 2.0], np.float32)
    weight = np.array([16 * a + b for a, b in numbers.reshape(-1, 2)], np.uint8)[:, None]
    expected = np.array([table[n] * absmax[i // 8] for i, n in enumerate(numbers)]).reshape(4, 6)
    tensors = {
        "m.weight": weight,
        "m.weight.absmax": absmax,
        "m.weight.quant_map": table,
        "m.weight.quant_state.bitsandbytes__nf4": _state(blocksize=8, shape=[4, 6], quant_type="nf4"),
    }
    np.testing.assert_array_equal(_unpacked({"quant_method": "bitsandbytes"}, {**tensors, **BIAS}), expected)

    nested = np.linspace(-1, 1, 256).astype(np.float32)
    codes, scales = (
        np.array([3, 200, 90], np.uint8),
        np.array([0.25, 0.75], np.float32),
    )  # of two, and of the third
    absmax = np.array([nested[c] * scales[i // 2] + np.float32(0.125) for i, c in enumerate(codes)])
    expected = np.array([table[n] * absmax[i // 8] for i, n in enumerate(numbers)]).reshape(4, 6)
    facts = {"blocksize": 8, "shape": [4, 6], "nested_blocksize": 2, "nested_offset": 0.125}
    tensors |= {
        "m.weight.absmax": codes,
        "m.weight.nested_absmax": scales,
        "m.weight.nested_quant_map": nested,
        "m.weight.quant_state.bitsandbytes__nf4": _state(**facts),
    }
    np.testing.assert_array_equal(_unpacked({"quant_method": "bitsandbytes"}, {**tensors, **BIAS}), expected)


def test_eight_bits_of_bitsandbytes_are_rows_of_127ths_of_their_maximum():
    tensors = {"m.weight": np.array([[127, -64], [1, 0]], np.int8), "m.SCB": np.array([2, 127], np.float32)}
    got = _unpacked({"quant_method": "bitsandbytes"}, {**tensors, "m.weight_format": np.uint8(0), **BIAS})
    np.testing.assert_allclose(got, [[2, -128 / 127], [1, 0]], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "weights quantised by 'hqq' are not supported: take the original weights"),
        ("fp8", "weights quantised by 'fp8' are not supported"),
        ({"quant_method": "gptq", "bits": 3}, "bits must be one of 2, 4, 8, got 3: take the original weights"),
        (
            {"quant_method": "awq", "bits": 4, "version": "gemv"},
            "version must be one of gemm, GEMM, got",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "format must be one of float",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"a block must be two numbers, got \[128\]"),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_name_with_what_to_do(settings, message):
    with pytest.raises(UserError, match=message):
        unpacker(settings)


def test_a_part_that_is_missing_or_of_another_size_is_named():
    weight = np.zeros((1, 8), np.int32)
    with pytest.raises(UserError, match=r"tensor 'm\.qweight' has no 'm\.qzeros' beside it"):
        unpacker({"quant_method": "gptq", "bits": 4})({"m.qweight": lambda: weight})
    tensors = {"m.weight": np.zeros((4, 4)), "m.weight_scale_inv": np.zeros((3, 2)), **BIAS}
    with pytest.raises(UserError, match=r"'m\.weight' cannot be unpacked: its scales have the shape \[3, 2\]"):
        _unpacked({"quant_method": "fp8", "weight_block_size": [2, 2]}, tensors)


def test_a_folder_of_float8_has_the_logits_of_transformers_and_is_exported_plain(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=48, vocab_size=23, max_position_embeddings=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scale = RANDOM.uniform(0.02, 0.05, (rows // 16, columns // 16)).astype(np.float32)
        whole = np.repeat(np.repeat(scale, 16, 0), 16, 1)
        tensors[name] = (tensors[name] / whole).astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}
    (tmp_path / "config.json").write_text(json.dumps(content))

    tokens = RANDOM.integers(0, 23, (2, 9))
    dequantised = FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=dequantised, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.as_tensor(tokens)).logits.numpy()
    model, params = load_pretrained(tmp_path)
    logits = model.apply(params, jnp.asarray(tokens), jnp.ones(tokens.shape, bool)).logits
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)

    save_pretrained(tmp_path / "out", model, params, like=tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "out")[1], params)
