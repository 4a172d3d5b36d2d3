"""Scorers out of folders and back: bit for bit, and nothing missing or left over."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.classifier import Classifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.folders.encoder import save_encoder
from hybrid_jax.models.folders.hf import Pretrained, load_pretrained, save_pretrained
from hybrid_jax.models.folders.scorer import load_scorer, read_extra, save_scorer
from hybrid_jax.models.heads import ClassificationHead
from hybrid_jax.models.lora import Lora
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.scorer import SequenceScorer, TextScorer, text_trunk
from hybrid_jax.models.text_encoder import TextEncoderConfig

LABELS = ("bad", "good")
SEPARATOR = 3
DECODER = DecoderConfig(vocab_size=23, num_layers=1, width=8, num_heads=2, max_length=16)
ENCODER = EncoderConfig(vocab_size=23, num_layers=1, width=8, num_heads=2, max_length=16)
TOKENS = jnp.asarray([[2, 5, 6, SEPARATOR, 7, 8, 9, SEPARATOR], [2, 11, SEPARATOR, 12, SEPARATOR, 0, 0, 0]])
MASK = jnp.asarray([[True] * 8, [True] * 5 + [False] * 3])
LAYERED = {"hidden_width": 4}
SCORERS = {  # a trunk, and settings of a head
    "ngrams": (NGrams((1, 2, 3), bucket_bits=5, width=3), {}),
    "classifier": (DECODER, {}),
    "classifier with adapters": (replace(DECODER, lora=Lora(rank=2)), {}),
    "unknown to transformers": (replace(DECODER, logit_softcap=2.0), {}),
    "a layer before the map": (DECODER, LAYERED),
    "encoder": (TextEncoderConfig(encoder=ENCODER), {}),
    "pairs": (TextEncoderConfig(encoder=ENCODER, pair="features", separator_id=SEPARATOR), LAYERED),
}


def scorer_of(trunk, **head):
    return TextScorer(text_trunk(trunk.build(23)), ClassificationHead(labels=LABELS, **head))


def moved(params):
    """Every parameter at a value of its own, so that none can be lost unseen."""
    random = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), params)


def scores(scorer, params, tokens=TOKENS, mask=MASK):
    return jax.jit(scorer.apply)(params, tokens, mask)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_written_and_read_gives_the_same_numbers(name, tmp_path):
    trunk, head = SCORERS[name]
    scorer = scorer_of(trunk, **head)
    assert isinstance(scorer, SequenceScorer)
    params = moved(scorer.init(jax.random.key(0)))
    save_scorer(tmp_path, scorer, params, extra={"temperature": 1.25})
    again, read = load_scorer(tmp_path)
    assert isinstance(again, SequenceScorer)
    assert again.labels == LABELS
    assert read_extra(tmp_path) == {"temperature": 1.25}
    before, after = scores(scorer, params), scores(again, read)
    if name != "classifier with adapters":  # which are merged: another order of sums
        np.testing.assert_array_equal(after, before)
    np.testing.assert_allclose(after, before, atol=1e-6)
    save_scorer(tmp_path, again, read)
    assert read_extra(tmp_path) == {}
    equal(load_scorer(tmp_path)[1], read)


def test_a_classifier_that_transformers_knows_is_written_for_it(tmp_path):
    scorer = scorer_of(DECODER, bias=False)
    params = moved(scorer.init(jax.random.key(0)))
    save_scorer(tmp_path, scorer, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = theirs(torch.as_tensor(np.array(TOKENS[:1], np.int64))).logits
    np.testing.assert_allclose(scores(scorer, params, TOKENS[:1], MASK[:1]), logits, atol=1e-5)


def test_a_head_reads_the_language_model_of_a_folder(tmp_path):
    untied = replace(DECODER, tie_embeddings=False)
    model = untied.build(23)
    save_pretrained(tmp_path, model, model.init(jax.random.key(3)))
    scorer = scorer_of(Pretrained(str(tmp_path)))
    params = scorer.init(jax.random.key(0))
    equal(params["trunk"], load_pretrained(tmp_path)[1])
    params = moved(params)
    save_scorer(tmp_path / "out", scorer, params)
    again, read = load_scorer(tmp_path / "out")
    assert isinstance(again, Classifier)
    assert "lm_head" not in read
    np.testing.assert_array_equal(scores(again, read), scores(scorer, params))


def test_a_head_that_trains_alone_gives_the_trunk_no_gradient(tmp_path):
    encoder = Encoder(ENCODER)
    save_encoder(tmp_path, encoder, encoder.init(jax.random.key(1)))
    scorer = scorer_of(TextEncoderConfig(path=str(tmp_path)), trains_trunk=False)
    params = moved(scorer.init(jax.random.key(0)))
    gradient = jax.grad(lambda p: scores(scorer, p).sum())(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["trunk"]))
    assert any(leaf.any() for leaf in jax.tree.leaves(gradient["head"]))
    save_scorer(tmp_path / "out", scorer, params)
    again, read = load_scorer(tmp_path / "out")
    np.testing.assert_array_equal(scores(again, read), scores(scorer, params))


def test_an_encoder_classifier_of_transformers_reads_pairs_as_it_does(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    theirs = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokens = {"version": "1.0", "added_tokens": [{"id": SEPARATOR, "content": "[SEP]"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"sep_token": "[SEP]"}))
    scorer, params = load_scorer(tmp_path)
    assert scorer.labels == LABELS
    types = np.array([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.as_tensor(np.array(TOKENS, np.int64)),
            attention_mask=torch.as_tensor(np.array(MASK, np.int64)),
            token_type_ids=torch.as_tensor(types),
        ).logits
    np.testing.assert_allclose(scores(scorer, params), logits, atol=1e-5)


def test_a_parameter_too_few_or_too_many_is_named(tmp_path):
    scorer = scorer_of(SCORERS["ngrams"][0])
    save_scorer(tmp_path, scorer, scorer.init(jax.random.key(0)))
    weights = load_file(tmp_path / "model.safetensors")
    bias = weights.pop("head/score/bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="parameter 'head/score/bias' is missing"):
        load_scorer(tmp_path)
    save_file({**weights, "head/score/bias": bias, "head/score/more": bias}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="parameter 'head/score/more' has no place"):
        load_scorer(tmp_path)
    save_file({**weights, "head/score/bias": bias[:1]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'head/score/bias' must be float \[2\], got float32 \[1\]"):
        load_scorer(tmp_path)
    broken = scorer.init(jax.random.key(0))
    broken["head"]["score"]["bias"] = jnp.asarray([0.0, jnp.nan])
    with pytest.raises(UserError, match="'head/score/bias' holds NaN"):
        save_scorer(tmp_path / "other", scorer, broken)


def test_a_folder_without_a_scorer_is_refused(tmp_path):
    model = DECODER.build(23)
    save_pretrained(tmp_path / "lm", model, model.init(jax.random.key(0)))
    with pytest.raises(UserError, match="not a classifier"):
        load_scorer(tmp_path / "lm")
    encoder = Encoder(ENCODER)
    save_encoder(tmp_path / "encoder", encoder, encoder.init(jax.random.key(1)))
    with pytest.raises(UserError, match="without a head for texts"):
        load_scorer(tmp_path / "encoder")
