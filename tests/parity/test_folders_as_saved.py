"""Folders as people save them: wrapped, without a head, with a head that should be tied, with another head."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.folders.encoder_decoder import load_encoder_decoder
from hybrid_jax.models.folders.hf import Pretrained, load_pretrained, save_pretrained

SIZES = {
    "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 23, "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 23, (2, 9))


def _save(folder, *, kind=transformers.LlamaForCausalLM, **settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, bos_token_id=None, eos_token_id=None, pad_token_id=None, **settings
    )
    kind(config).save_pretrained(folder)
    return folder


def _rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def _ours(folder):
    model, params = load_pretrained(folder)
    return np.asarray(model.apply(params, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool)).logits)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return _theirs(_save(tmp_path_factory.mktemp("plain"), tie_word_embeddings=True))


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.{}",  # DataParallel
        "_orig_mod.{}",  # torch.compile
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        "model.{}",  # Lightning
        "base_model.model.{}",  # peft, merged
    ],
)
def test_a_model_that_was_saved_in_its_wrapper_has_the_same_logits(tmp_path, expected, wrapped):
    _save(tmp_path, tie_word_embeddings=True)
    _rename(tmp_path, lambda tensors: {wrapped.format(name): tensor for name, tensor in tensors.items()})
    np.testing.assert_allclose(_ours(tmp_path), expected, atol=1e-5)


def test_a_wrapper_within_a_name_is_taken_away_and_a_name_that_is_there_twice_is_refused(tmp_path, expected):
    _save(tmp_path, tie_word_embeddings=True)
    _rename(tmp_path, lambda t: {name.replace("layers.0.", "layers.0._orig_mod."): a for name, a in t.items()})
    np.testing.assert_allclose(_ours(tmp_path), expected, atol=1e-5)
    _rename(tmp_path, lambda t: {**t, "module.model.norm.weight": t["model.norm.weight"]})
    with pytest.raises(UserError, match=r"tensor 'model\.norm\.weight' is also there as 'm"):
        load_pretrained(tmp_path)


def test_an_adapter_beside_its_base_says_what_to_do(tmp_path):
    _save(tmp_path, tie_word_embeddings=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    _rename(tmp_path, lambda t: {f"base_model.model.{n}": a for n, a in t.items()} | {name: np.ones((2, 16))})
    with pytest.raises(UserError, match=r"is of an adapter: merge the adapter into its base .* lora\.path"):
        load_pretrained(tmp_path)


def test_a_head_that_differs_from_the_embedding_is_kept_though_the_config_ties_them(tmp_path):
    _save(tmp_path / "in", tie_word_embeddings=False)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    theirs = _theirs(tmp_path / "in")
    np.testing.assert_allclose(_ours(tmp_path / "in"), theirs, atol=1e-5)
    model = Pretrained(str(tmp_path / "in")).build()
    save_pretrained(tmp_path / "out", model, model.init(None))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(_theirs(tmp_path / "out"), theirs, atol=1e-6)


def test_a_tied_folder_may_hold_the_head_alone(tmp_path, expected):
    _save(tmp_path, tie_word_embeddings=True)

    def head_alone(tensors):
        return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}

    _rename(tmp_path, head_alone)
    np.testing.assert_allclose(_theirs(tmp_path), expected, atol=1e-5)
    np.testing.assert_allclose(_ours(tmp_path), expected, atol=1e-5)


def test_a_model_without_a_head_is_whole_where_it_is_tied_and_names_the_head_where_it_is_not(
    tmp_path, expected
):
    _save(tmp_path / "tied", kind=transformers.LlamaModel, tie_word_embeddings=True)
    np.testing.assert_allclose(_theirs(tmp_path / "tied"), expected, atol=1e-5)
    np.testing.assert_allclose(_ours(tmp_path / "tied"), expected, atol=1e-5)
    _save(tmp_path / "untied", kind=transformers.LlamaModel, tie_word_embeddings=False)
    with pytest.raises(
        UserError, match=r"'lm_head\.weight' is missing .* tie_word_embeddings: true .*only heads"
    ):
        load_pretrained(tmp_path / "untied")


@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForQuestionAnswering"])
def test_the_trunk_of_another_head_is_read_and_the_head_named(tmp_path, expected, caplog, kind):
    _save(tmp_path, kind=getattr(transformers, f"Llama{kind}"), tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(_ours(tmp_path), expected, atol=1e-5)
    assert f"only the trunk of the Llama{kind} is read" in caplog.text


@pytest.mark.parametrize("kept", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_a_t5_may_hold_one_copy_of_its_embedding_alone(tmp_path, kept):
    """As madlad does: without `shared.weight`."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=23, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    _rename(
        tmp_path, lambda t: {kept if name == "shared.weight" else name: tensor for name, tensor in t.items()}
    )
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.as_tensor(TOKENS), labels=torch.as_tensor(TOKENS)).logits.numpy()
    model, params = load_encoder_decoder(tmp_path)
    ones = jnp.ones(TOKENS.shape, bool)
    logits = model.apply_pairs(params, jnp.asarray(TOKENS), ones, jnp.asarray(TOKENS), ones).logits
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4)
