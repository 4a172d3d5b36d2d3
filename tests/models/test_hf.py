"""Folders in and out without `transformers`: shards, old names, and one clear line for everything damaged."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders import files, hf
from hybrid_jax.models.folders.files import WEIGHTS
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained
from hybrid_jax.models.folders.host_copy import packed

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


def test_every_parameter_type_and_sharding_gives_the_same_numbers(folder):
    params = load_pretrained(folder)[1]
    _, half = load_pretrained(folder, param_dtype="bfloat16")
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16), params)
    jax.tree.map(np.testing.assert_array_equal, half, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), "x")
    spread, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in [(None, "x"), ()])

    def sharding(path, shape):
        return spread if path.endswith("kernel") else whole

    _, sharded = load_pretrained(folder, sharding=sharding)
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    kernel = sharded["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == spread
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(8, 8)] * 4
    _, everywhere = load_pretrained(folder, sharding=whole)
    assert {leaf.sharding for leaf in jax.tree.leaves(everywhere)} == {whole}


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_untouched_tensors_come_back_byte_for_byte(tmp_path, dtype, stored):
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=11,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0,
    )  # fmt: skip
    model = hf.FAMILIES["llama"].read_config(config.to_dict()).build()
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape), jax.eval_shape(model.init, jax.random.key(0))
    )
    old, new = tmp_path / "old", tmp_path / "new"
    save_pretrained(old, model, params, dtype=dtype)
    content = {**config.to_dict(), "torch_dtype": dtype, "their_own_setting": {"a": [1]}}
    content.pop("dtype")
    (old / "config.json").write_text(json.dumps(content))
    (old / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "eos_token_id": [2, 3]}))

    model, params = load_pretrained(old)
    save_pretrained(new, model, params, dtype=dtype, max_shard_bytes=1000, like=old)
    assert len(list(new.glob("*.safetensors"))) > 2
    before, after = _bytes(old), _bytes(new)
    assert before == after
    assert {kind for kind, _, _ in after.values()} == {stored}
    exported = json.loads((new / "config.json").read_text())
    kept = {"their_own_setting": {"a": [1]}, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}
    assert {name: exported[name] for name in kept} == kept
    assert (exported["architectures"], exported["dtype"]) == (["LlamaForCausalLM"], dtype)
    assert json.loads((new / "generation_config.json").read_text())["repetition_penalty"] == 1.5
    save_pretrained(new, model, params, eos_ids=(4,), dtype=dtype, like=old)  # over the shards
    assert _bytes(new) == before
    assert sorted(path.name for path in new.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]
    assert json.loads((new / "config.json").read_text())["eos_token_id"] == 4


def _bytes(folder):
    """What safetensors itself finds in the files of a folder."""
    from safetensors import deserialize

    tensors = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in deserialize(path.read_bytes()):
            tensors[name] = (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
    return tensors


def _sharded(folder):
    """(the index's path, its weight_map) of the folder written in several files"""
    model, params = load_pretrained(folder)
    save_pretrained(folder, model, params, max_shard_bytes=600)
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())["weight_map"]


DAMAGED_SHARDS = {
    "tensor 'transformer.ln_f.bias' is not listed in model.safetensors.index.json": lambda index, placed: (
        placed.pop("transformer.ln_f.bias")
    ),
    "tensor 'transformer.h.9.ln_1.bias' is missing, model.safetensors.index.json lists it there": (
        lambda index, placed: placed.update({"transformer.h.9.ln_1.bias": placed["transformer.ln_f.bias"]})
    ),
    "a shard must lie beside it, got '../model.safetensors'": lambda index, placed: placed.update(
        {"transformer.ln_f.bias": "../model.safetensors"}
    ),
    "'weight_map' must say for each tensor in which file it is": lambda index, placed: placed.update(
        {"transformer.ln_f.bias": 3}
    ),
    "tensor 'transformer.ln_f.bias' is also in ": lambda index, placed: save_file(
        {
            **load_file(index.parent / placed["transformer.wte.weight"]),
            "transformer.ln_f.bias": np.ones(8, np.float32),
        },
        index.parent / placed["transformer.wte.weight"],
    ),
}


@pytest.mark.parametrize("message", DAMAGED_SHARDS)
def test_an_index_that_does_not_fit_its_shards_names_file_and_tensor(folder, message):
    index, placed = _sharded(folder)
    DAMAGED_SHARDS[message](index, placed)
    index.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(folder / "model"))


def _header(**changes):
    """Changes to the entry of transformer.ln_f.bias; the data stay where they are."""

    def damage(data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["transformer.ln_f.bias"] |= changes
        return _written(json.dumps(header).encode(), data[8 + length :])

    return damage


def _written(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:4], "it ends before its header does"),
        (lambda data: data[:100], "it ends before its header does"),
        (lambda data: (2**62).to_bytes(8, "little") + data[8:], "it ends before its header does"),
        (lambda data: data[:8] + b"}" + data[9:], "its header: not JSON: "),
        (
            lambda data: _written(b"[" * 20_000, data),
            "its header: more than 100 objects and lists in one another",
        ),
        (lambda data: _written(b'{"a": 1, "a": 2}', data), "its header: key 'a' is there twice; keep one"),
        (lambda data: _written(b" " * (25 * 2**20 + 1), data), "its header must have at most 25 MiB, got 25"),
        (lambda data: data[:-4], "it ends before tensor 'transformer."),
        (lambda data: data + b"1234", "4 bytes belong to no tensor"),
        (_header(shape=[9]), "tensor 'transformer.ln_f.bias' is not where it should be"),
        (_header(data_offsets=[0, 32]), "is not where it should be"),  # where another tensor is
        (_header(shape=[-8]), "its header is damaged: "),
        (_header(data_offsets=[0]), "its header is damaged: "),
        (_header(shape=[0, 2**47, 2**47]), "its header is damaged: "),
        (_header(shape=[8, *[1] * 70]), "its header is damaged: "),
        (_header(dtype="F4"), "tensor 'transformer.ln_f.bias' has the dtype F4, which is not supported"),
        (
            _header(dtype="I32"),
            "'transformer.ln_f.bias' [8] must hold floating-point numbers, got int32",
        ),
    ],
)
def test_a_torn_safetensors_file_says_where(folder, damage, message):
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        load_pretrained(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_weights_that_are_not_finite_are_found_on_request(folder):
    def spoil(tensors):
        tensors["transformer.h.0.mlp.c_fc.weight"][3, 2] = np.inf

    _edit(folder, spoil)
    load_pretrained(folder)
    message = r"model\.safetensors: tensor 'transformer\.h\.0\.mlp\.c_fc\.weight' holds NaN or infinity"
    with pytest.raises(UserError, match=message):
        load_pretrained(folder, check_finite=True)
    model = parse(BACKBONES["pretrained"], {"path": str(folder), "check_finite": True}).build()
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float32", "'transformer.ln_f.bias' holds NaN or infinity, so the model is not exported"),
        (7e4, "float16", "'transformer.ln_f.bias' is too large for float16; export as bfloat16 or float32"),
    ],
)
def test_a_parameter_that_is_not_finite_is_not_exported(folder, value, dtype, message):
    model, params = load_pretrained(folder)
    before = _bytes(folder)
    params["final_norm"]["bias"] = params["final_norm"]["bias"].at[2].set(value)
    with pytest.raises(UserError) as caught:
        save_pretrained(folder, model, params, dtype=dtype)
    assert message in str(caught.value)
    assert _bytes(folder) == before  # what was there is still there, and nothing beside it
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]


def test_an_interrupted_export_leaves_no_folder_that_loads(folder, monkeypatch):
    model, params = load_pretrained(folder)
    moved = []

    def replace(source, target):
        if source.parent.name == ".unfinished" and target.parent == folder:
            moved.append(target.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        os_replace(source, target)

    os_replace = files.os.replace
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, model, params, max_shard_bytes=600)
    assert not (folder / "config.json").exists()
    with pytest.raises(UserError, match=r"no file .*config\.json"):
        load_pretrained(folder)
    monkeypatch.undo()
    save_pretrained(folder, model, params)
    _same(folder, params)


@pytest.mark.parametrize(
    ("quantization", "name"), [({"quant_method": "hqq"}, "by 'hqq'"), ({"quant_method": "fp8"}, "of a gpt2")]
)
def test_quantised_weights_that_are_not_read_are_refused_by_name(folder, quantization, name):
    _edit_config(folder, quantization_config=quantization)
    with pytest.raises(
        UserError, match=rf"config\.json: .*quantised.* {name} are not supported: take the orig"
    ):
        load_pretrained(folder)


def test_old_torch_files_in_shards_and_in_half_precision_load(folder):
    import torch

    params = load_pretrained(folder)[1]
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    placed = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for i, part in enumerate(sorted(set(placed.values()))):
        state = {n: torch.as_tensor(t).to(torch.bfloat16) for n, t in tensors.items() if placed[n] == part}
        torch.save(state, folder / part, _use_new_zipfile_serialization=bool(i))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    rounded = jax.tree.map(lambda a: np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float32), params)
    _same(folder, rounded)
    (folder / "pytorch_model-1.bin").unlink()
    with pytest.raises(UserError, match=r"no weight file .*pytorch_model-1\.bin"):
        load_pretrained(folder)


def test_a_family_that_is_named_is_the_one_that_is_written(tmp_path):
    model = replace(CONFIG, family="llama").build(11)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.eval_shape(model.init, jax.random.key(0)))
    with pytest.raises(UserError, match="position must be 'rotary' for a llama export, got 'learned'"):
        save_pretrained(tmp_path, model, params)
    with pytest.raises(UserError, match="unknown family 'lama'; did you mean 'llama'"):
        save_pretrained(tmp_path, replace(CONFIG, family="lama").build(11), params)


@pytest.mark.parametrize("shape", [(300, 130), (2, 131, 257), (5,), (1, 4), (0, 3), (700, 600)])
@pytest.mark.parametrize("turned", [False, True])
def test_packed_copies_are_row_major_equal_and_aligned(shape, turned):
    source = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if turned and len(shape) > 1:
        source = np.swapaxes(source, -1, -2)
    for array, dtype in [(source, np.float32), (source[..., 1:], ml_dtypes.bfloat16)]:
        copy = packed(array, dtype)
        assert copy.flags.c_contiguous
        assert copy.ctypes.data % 64 == 0 or copy.size == 0
        np.testing.assert_array_equal(copy, array.astype(dtype))
        assert not np.shares_memory(copy, array)


def test_a_tokenizer_may_have_a_few_tokens_that_its_model_never_reads(tmp_path, caplog):
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(3000)
    save_pretrained(tmp_path, model, model.init(jax.random.key(0)))
    assert BACKBONES["pretrained"](path=str(tmp_path)).build(3001).vocab_size == 3000
    assert "a text that holds one of the last 1 is refused" in caplog.text
    with pytest.raises(UserError, match="the tokenizer has 3010 tokens, more than the 3000 of"):
        BACKBONES["pretrained"](path=str(tmp_path)).build(3010)
