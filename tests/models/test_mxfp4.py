"""The format in which gpt-oss is published: single numbers by hand, and all bytes against transformers."""

import numpy as np

from hybrid_jax.models.families.gpt_oss import GPT_OSS
from hybrid_jax.models.families.mxfp4 import unpack_mxfp4
from hybrid_jax.models.folders.quantised import unpacker


def _unpacked(blocks, scales):
    tensors = {"x.w_blocks": lambda: blocks, "x.w_scales": lambda: scales, "x.bias": lambda: np.zeros(1)}
    read = unpacker({"quant_method": "mxfp4"})(tensors)
    assert read.keys() == {"x.w", "x.bias"}
    return read["x.w"]()


def test_a_byte_holds_two_numbers_the_lower_half_first():
    blocks = np.zeros((1, 1, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = [0x1 | 0x7 << 4, 0x9 | 0xE << 4]  # 0.5 and 6; -0.5 and -4
    weights = _unpacked(blocks, np.full((1, 1, 1), 128, np.uint8))  # 2^(128 - 127)
    assert weights.shape == (1, 32, 1)
    assert weights[0, :5, 0].tolist() == [1.0, 12.0, -1.0, -8.0, 0.0]


def test_all_bytes_and_many_scales_equal_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.permutation(np.arange(2 * 4 * 3 * 16) % 256).astype(np.uint8).reshape(2, 4, 3, 16)
    scales = random.integers(110, 140, (2, 4, 3)).astype(np.uint8)
    expected = convert_moe_packed_tensors(torch.as_tensor(blocks), torch.as_tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(_unpacked(blocks, scales), expected.numpy())


def test_blocks_without_scales_stay_as_they_are():
    tensors = {"x_blocks": lambda: np.zeros(1, np.uint8)}
    assert unpack_mxfp4(tensors) == tensors


def test_a_published_folder_is_read_packed_and_exported_unpacked(tmp_path):
    import json

    import jax
    from safetensors.numpy import load_file, save_file

    from hybrid_jax.models.decoder import Decoder
    from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained

    config = GPT_OSS.read_config(
        {
            "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 5, "num_local_experts": 2,
            "num_experts_per_tok": 1, "layer_types": ["full_attention"],
        }
    )  # fmt: skip
    model = Decoder(config)
    save_pretrained(tmp_path / "plain", model, model.init(jax.random.key(0)))
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    random = np.random.default_rng(0)
    packed = {}
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        packed[f"{name}_blocks"] = random.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        packed[f"{name}_scales"] = random.integers(118, 124, (experts, outputs, inputs // 32), np.uint8)
    (tmp_path / "packed").mkdir()
    save_file({**tensors, **packed}, tmp_path / "packed" / "model.safetensors")
    content = json.loads((tmp_path / "plain" / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(content))

    model, params = load_pretrained(tmp_path / "packed")
    save_pretrained(tmp_path / "again", model, params, like=tmp_path / "packed")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "again")[1], params)
    assert np.abs(params["layer_0"]["mlp"]["expert_up"]["kernel"]).max() > 0.01
