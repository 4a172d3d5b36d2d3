"""A tokenizer larger than its model: rows for its tokens, or one line before anything is trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.bounded_tokenizer import bounded
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models import vocabulary
from hybrid_jax.models.base import BACKBONES
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders.hf import Pretrained, abstract_params, load_pretrained
from hybrid_jax.models.folders.pretrained import save_pretrained
from hybrid_jax.models.lora import Lora
from hybrid_jax.runs.policy import load_pretrained_policy
from hybrid_jax.sampling.base import sample

VOCAB, LARGER = 61, 64
_SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCAB}
_SIZES |= {"max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "gpt2": {**_SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # tied
    "llama": {**_SIZES, "intermediate_size": 48, "tie_word_embeddings": False},
    "phi": {**_SIZES, "intermediate_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # a head with biases
}


def saved(model, folder):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def logits_of(model, batch):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(batch)).logits.numpy()


def all_tokens():
    return np.arange(LARGER).reshape(2, -1)


@pytest.mark.parametrize("family", CONFIGS)
def test_new_rows_are_those_of_transformers_and_an_export_has_the_new_size(family, tmp_path):
    saved(AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**CONFIGS[family])), tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    theirs.resize_token_embeddings(LARGER, mean_resizing=True)
    model = Pretrained(str(tmp_path / "base"), resize_vocabulary=True).build(LARGER)
    params = model.init(jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(model))
    ours = np.asarray(jax.jit(lambda p: model.apply(p, all_tokens()).logits)(params))
    # Their new rows have noise of 3e-5 of a deviation of the others, which the first norm of Llama enlarges.
    np.testing.assert_allclose(ours, logits_of(theirs, all_tokens()), rtol=0, atol=1e-3)

    save_pretrained(tmp_path / "out", model, params)
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == LARGER
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(logits_of(again, all_tokens()), ours, rtol=0, atol=1e-5)


def test_an_encoder_decoder_gets_new_rows_too(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
    config = T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    saved(T5ForConditionalGeneration(config), tmp_path)
    old = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    component = BACKBONES["pretrained_encoder_decoder"](str(tmp_path), resize_vocabulary=True)
    model = component.build(LARGER)
    save_pretrained(tmp_path / "out", model, model.init(jax.random.key(0)))
    new = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("shared.weight", "lm_head.weight"):
        mean = old[name].mean(0).expand(LARGER - VOCAB, -1)
        np.testing.assert_allclose(new[name], torch.cat([old[name], mean]), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"more than the 61 of .*: model\.resize_vocabulary: true gives"):
        BACKBONES["pretrained_encoder_decoder"](str(tmp_path)).build(LARGER)


def test_a_model_with_rows_to_spare_keeps_them(tmp_path):
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(VOCAB)
    save_pretrained(tmp_path, model, model.init(jax.random.key(0)))
    assert Pretrained(str(tmp_path), resize_vocabulary=True).build(VOCAB - 3).vocab_size == VOCAB
    assert Pretrained(str(tmp_path), resize_vocabulary=True).build(None).vocab_size == VOCAB


def test_new_rows_below_a_frozen_embedding_are_warned_of(tmp_path, caplog):
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(VOCAB)
    save_pretrained(tmp_path, model, model.init(jax.random.key(0)))
    Pretrained(str(tmp_path), resize_vocabulary=True, lora=Lora()).build(LARGER)
    assert "the 3 new rows stay the mean of the others" in caplog.text


def _tokenizer():
    """257 tokens and the two of a template, with the ids 257 and 258."""
    return Bytes(chat_template="chatml").build()


CHAT = (Example("q", messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})),)


def test_only_texts_that_hold_a_token_without_a_row_are_refused():
    tokenizer = bounded(_tokenizer(), 257, "this helps")
    assert tokenizer.vocab_size == 259
    assert tokenizer.encode("ab") == [97, 98]
    assert len(encode_examples([Example("a", "b")], tokenizer, None)) == 1
    said = r"row 1: the text holds the token '<\|im_start\|>' with the id 257, but the model has 257 rows: this"
    with pytest.raises(UserError, match=said):
        encode_examples(CHAT, tokenizer, None)
    with pytest.raises(UserError, match=said):
        PromptStream(CHAT, tokenizer, None)
    with pytest.raises(UserError, match=r"its end token holds the token .* with the id 256"):
        bounded(_tokenizer(), 256, "this helps")
    plain = _tokenizer()
    assert bounded(plain, 259, "") is plain


@pytest.fixture
def base(tmp_path):
    """A folder with a model of 257 rows and a tokenizer of 259 tokens."""
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=64).build(257)
    save_pretrained(tmp_path / "base", model, model.init(jax.random.key(0)), eos_ids=(256,))
    _tokenizer().save(tmp_path / "base")
    questions = [CHAT[0].messages[0] | {"content": f"q{i}"} for i in range(8)]
    rows = [{"messages": [question, CHAT[0].messages[1]]} for question in questions]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "base"


def config_of(base, *overrides):
    folder = base.parent
    text = f"""
run_dir: {folder / "run"}
data: {{name: chat, train: {folder / "data.jsonl"}, held_out_fraction: 0.25}}
tokenizer: {{name: huggingface, path: {base}}}
model: {{name: pretrained, path: {base}}}
phases: {{sft: {{batch_size: 2, length: 64}}}}
scheduler: {{name: alternation, cycle: {{sft: 1}}}}
evaluation: {{num_prompts: 1, num_examples: 1, num_shown: 1, batch_size: 1, length: 64}}
steps: 2
compilation_cache: null
"""
    (folder / "config.yaml").write_text(text)
    return load_config(folder / "config.yaml", list(overrides))


def test_a_run_is_refused_before_training_with_the_setting_that_helps_and_trains_with_it(base, monkeypatch):
    with pytest.raises(UserError, match=r"259 tokens, more than the 257 .*model\.resize_vocabulary: true"):
        build(config_of(base))
    experiment = build(config_of(base, "model.resize_vocabulary=true"))
    state = experiment.train()
    assert experiment.model.vocab_size == 259
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.policy))
    table = np.asarray(state.policy["token_embedding"]["embedding"])
    old = np.asarray(load_pretrained(base)[1]["token_embedding"]["embedding"])
    assert np.abs(table[257:] - old.mean(0)).max() > 1e-6  # they have learnt
    experiment.export(state, base.parent / "out")
    assert AutoModelForCausalLM.from_pretrained(base.parent / "out").config.vocab_size == 259

    monkeypatch.setattr(vocabulary, "_TOLERANCE", 1.1)
    with pytest.raises(UserError, match=r"the text holds.*<\|im_start\|>.*model\.resize_vocabulary: true"):
        build(config_of(base, f"run_dir={base.parent / 'other'}"))


def test_a_folder_whose_tokenizer_is_too_large_answers_only_what_it_can_read(base):
    policy = load_pretrained_policy(base, ["sampler.max_new_tokens=2"])
    assert len(policy.generate(["ab"])) == 1
    with pytest.raises(UserError, match=r"prompt 1.*<\|im_start\|>.*needs the tokenizer that belongs to its"):
        policy.generate([[{"role": "user", "content": "q"}]])


def test_ids_without_a_token_may_be_sampled_and_decode_to_nothing(tmp_path):
    model = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(300)
    params = model.init(jax.random.key(0))
    # Every row but 280 is near zero: that id is what this model says.
    table = jnp.full((300, 8), 1e-3).at[280].set(jnp.asarray(params["token_embedding"]["embedding"][280]))
    params["token_embedding"]["embedding"] = table
    params["final_norm"]["bias"] = 10 * table[280] / jnp.linalg.norm(table[280])
    params["final_norm"]["scale"] = jnp.zeros(8)
    save_pretrained(tmp_path, model, params, eos_ids=(256,))
    Bytes().build().save(tmp_path)
    policy = load_pretrained_policy(tmp_path, ["sampler.max_new_tokens=3"])
    prompt = jnp.asarray([[97]])
    drawn = sample(policy.sampler, model, params, prompt, prompt > 0, jax.random.key(0), eos_ids=(256,))
    assert drawn.tokens.tolist() == [[280, 280, 280]]
    assert policy.generate(["a"])[0].response == ""
    assert policy.tokenizer.decode([97, 280, 98]) == "ab"
