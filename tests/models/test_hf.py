"""Folders in and out without `transformers`: shards, old names, and one clear line for everything damaged."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.config import parse
from hybrid_jax.core.registry import UserError
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.hf import load_pretrained, save_pretrained

CONFIG = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16)


@pytest.fixture
def folder(tmp_path):
    model, random = CONFIG.build(11), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    save_pretrained(tmp_path, model, params)
    return tmp_path


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


def _same(folder, params):
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(folder)[1], params)


def test_shards_with_an_index_load_like_one_file(folder):
    params = load_pretrained(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    placed = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(placed.values()):
        save_file({n: t for n, t in tensors.items() if placed[n] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    _same(folder, params)
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weight file .*part-1\.safetensors"):
        load_pretrained(folder)


def test_old_names_buffers_and_the_copy_of_a_tied_head_load_too(folder):
    params = load_pretrained(folder)[1]

    def old_style(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    _edit(folder, old_style)
    _same(folder, params)


def test_bfloat16_weights_become_float32_parameters(folder):
    def halve(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    params = load_pretrained(folder)[1]
    _edit(folder, halve)
    model, loaded = load_pretrained(folder, dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_a_plain_torch_file_loads_and_one_with_code_does_not(folder):
    import torch

    params = load_pretrained(folder)[1]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.as_tensor(t) for name, t in tensors.items()}, folder / "pytorch_model.bin")
    _same(folder, params)
    torch.save({"code": CONFIG}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a plain PyTorch weight file"):
        load_pretrained(folder)


DAMAGE = {
    "tensor 'transformer.wpe.weight' is missing from the gpt2 weights": lambda t: t.pop(
        "transformer.wpe.weight"
    ),
    "tensor 'transformer.h.1.ln_1.weight' has no place in a gpt2 model": lambda t: t.update(
        {"transformer.h.1.ln_1.weight": np.ones(8, np.float32)}
    ),
    "tensor 'wte.weight' is there twice, with and without 'transformer.'": lambda t: t.update(
        {"wte.weight": t["transformer.wte.weight"].copy()}
    ),
    "tensor 'transformer.ln_f.bias' [7] gives final_norm/bias the shape [7], the config says [8]": lambda t: (
        t.update({"transformer.ln_f.bias": np.ones(7, np.float32)})
    ),
    "tensor 'transformer.h.0.attn.c_attn.bias' [23]: expected 24 outputs, got 23": lambda t: t.update(
        {"transformer.h.0.attn.c_attn.bias": np.ones(23, np.float32)}
    ),
    "tensor 'lm_head.weight' differs from 'wte.weight', but the config ties them": lambda t: t.update(
        {"lm_head.weight": np.ones((11, 8), np.float32)}
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_weight_file_names_the_tensor(folder, message):
    _edit(folder, DAMAGE[message])
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean 'llama'? known: bloom,"),
        ({"n_embd": "drop"}, "model.safetensors: tensor 'transformer.h.0.mlp.c_fc.weight' [8, 32] gives"),
        ({"n_head": 3}, "width must be a multiple of num_heads=3, got 8"),
        ({"activation_function": "mish"}, "activation_function must be one of"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"n_layer": "two"}, "config.json: "),
    ],
)
def test_a_config_that_cannot_be_read_says_what_is_wrong(folder, changes, message):
    _edit_config(folder, **changes)
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torn_and_absent_files_are_one_clear_line(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights: expected model\.safetensors"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_pretrained(folder)
    with pytest.raises(UserError, match=r"no file '.*nowhere/config\.json'"):
        load_pretrained(folder / "nowhere")


def test_a_decoder_of_no_known_family_says_why(tmp_path):
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, norm="rms").build(11)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(model.init, jax.random.key(0)))
    with pytest.raises(UserError) as caught:
        save_pretrained(tmp_path, model, params)
    assert (
        "no Hugging Face family can express this model; the nearest is gpt2, "
        "which has norm 'layer' instead of 'rms'" in str(caught.value)
    )
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_refused(folder, tmp_path):
    model, params = load_pretrained(folder)
    with pytest.raises(UserError, match="parameter 'value_head/kernel' is not of this model"):
        save_pretrained(tmp_path, model, params | {"value_head": {"kernel": np.zeros((8, 1))}})


def test_the_pretrained_backbone_starts_from_its_folder(folder):
    settings = {"path": str(folder)}
    model = parse(BACKBONES["pretrained"], settings).build(9)
    assert (model.vocab_size, model.max_length, model.config.dropout) == (11, 16, 0.0)
    _same(folder, model.init(jax.random.key(1)))
    assert hash(model) == hash(BACKBONES["pretrained"](**settings).build(9))
    with pytest.raises(UserError, match="the tokenizer has 12 tokens, more than the 11 of"):
        BACKBONES["pretrained"](**settings).build(12)
