"""A folder whose tokenizer puts BOS in front of texts, as transformers reads it."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from hybrid_jax.data.continuations import encode_prompts
from hybrid_jax.rewards.likelihood import Perplexity
from hybrid_jax.runs.files import fetched
from hybrid_jax.runs.policy import load_pretrained_policy
from hybrid_jax.runs.saved_tokenizer import saved_tokenizer

PROMPTS = ["say 1:", "say 2: ", "one\n", "two words"]
OVERRIDES = ["sampler.temperature=0", "sampler.max_new_tokens=6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of transformers with a tokenizer of sentencepiece's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    folder = tmp_path_factory.mktemp("llama")
    special = ["<unk>", "<s>", "</s>"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz:0123456789"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁s", "▁w"]
    merges = [("▁", "s"), ("▁", "w")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def transformers_says(folder, prompts, new=6):
    """The greedy continuations of transformers, each of a prompt alone, as the text behind the prompt's."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")
        written = model.generate(
            **asked, do_sample=False, max_new_tokens=new, pad_token_id=tokenizer.eos_token_id
        )
        before = tokenizer.decode(asked["input_ids"][0], skip_special_tokens=True)
        whole = tokenizer.decode(written[0], skip_special_tokens=True)
        assert whole.startswith(before)
        texts.append(whole[len(before) :])
    return texts


def test_greedy_answers_are_those_of_transformers(folder):
    answers = load_pretrained_policy(folder, OVERRIDES).generate(PROMPTS)
    theirs = transformers_says(folder, PROMPTS)
    assert [answer.response for answer in answers] == theirs
    assert len(set(theirs)) > 1


def test_likelihoods_are_those_of_transformers_with_bos(folder):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    (ours,) = Perplexity(str(folder))(["say 1:\n"], ["two words"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = tokenizer("say 1:\ntwo words", return_tensors="pt")["input_ids"]
    count = len(tokenizer("say 1:\n")["input_ids"])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(whole).logits[0, :-1], -1)
    found = log_probs.gather(1, whole[0, 1:, None])[count - 1 :, 0]
    np.testing.assert_allclose(ours, float(found.mean()), rtol=1e-4)


def test_a_run_from_before_bos_was_added_goes_on_without_and_says_so(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "tokenizer")
    own = {"name": "huggingface", "path": str(folder)}
    (tmp_path / "config.yaml").write_text(json.dumps({"tokenizer": own}))
    old = saved_tokenizer(fetched(tmp_path))
    assert "learned texts without the BOS token" in caplog.text
    (with_bos,) = encode_prompts(load_pretrained_policy(folder).tokenizer, ["say 1:"])
    assert encode_prompts(old, ["say 1:"]) == [with_bos[1:]]
    old.save(tmp_path / "tokenizer")  # as the run does when it goes on
    (tmp_path / "config.yaml").write_text(json.dumps({"tokenizer": {**own, "add_bos": "auto"}}))
    assert encode_prompts(saved_tokenizer(fetched(tmp_path)), ["say 1:"]) == [with_bos[1:]]
