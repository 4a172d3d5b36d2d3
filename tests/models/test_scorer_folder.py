"""Scorers out of folders and back: bit for bit, and nothing missing or left over."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.classifier import Classifier, ClassifierSettings, PretrainedClassifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.encoder_scorer import EncoderScorerSettings
from hybrid_jax.models.folders.encoder import save_encoder
from hybrid_jax.models.folders.hf import Pretrained, load_pretrained, save_pretrained
from hybrid_jax.models.folders.scorer import load_scorer, read_extra, save_scorer
from hybrid_jax.models.lora import Lora, split
from hybrid_jax.models.ngram_scorer import NGrams
from hybrid_jax.models.scorer import SequenceScorer

LABELS = ("bad", "good")
SEPARATOR = 3
DECODER = DecoderConfig(vocab_size=23, num_layers=1, width=8, num_heads=2, max_length=16)
ENCODER = EncoderConfig(vocab_size=23, num_layers=1, width=8, num_heads=2, max_length=16)
TOKENS = jnp.asarray([[2, 5, 6, SEPARATOR, 7, 8, 9, SEPARATOR], [2, 11, SEPARATOR, 12, SEPARATOR, 0, 0, 0]])
MASK = jnp.asarray([[True] * 8, [True] * 5 + [False] * 3])
SCORERS = {
    "ngrams": NGrams(LABELS, (1, 2, 3), bucket_bits=5, width=3),
    "classifier": ClassifierSettings(DECODER, LABELS),
    "classifier with adapters": ClassifierSettings(
        DecoderConfig(**{**vars(DECODER), "lora": Lora(rank=2)}), LABELS
    ),
    "unknown to transformers": ClassifierSettings(
        DecoderConfig(**{**vars(DECODER), "logit_softcap": 2.0}), LABELS
    ),
    "encoder": EncoderScorerSettings(labels=LABELS, encoder=ENCODER),
    "pairs": EncoderScorerSettings(
        labels=LABELS, encoder=ENCODER, pair="features", separator_id=SEPARATOR, hidden_width=4
    ),
}


def moved(params):
    """Every parameter at a value of its own, so that none can be lost unseen."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_written_and_read_gives_the_same_numbers(name, tmp_path):
    scorer = SCORERS[name].build(23)
    assert isinstance(scorer, SequenceScorer)
    params = moved(scorer.init(jax.random.key(0)))
    save_scorer(tmp_path, scorer, params, extra={"temperature": 1.25})
    again, read = load_scorer(tmp_path)
    assert isinstance(again, SequenceScorer)
    assert again.labels == LABELS
    assert read_extra(tmp_path) == {"temperature": 1.25}
    before, after = scorer.apply(params, TOKENS, MASK), again.apply(read, TOKENS, MASK)
    if name != "classifier with adapters":  # which are merged: another order of sums
        equal(split(read)[0], split(params)[0])
        np.testing.assert_array_equal(after, before)
    np.testing.assert_allclose(after, before, atol=1e-6)
    save_scorer(tmp_path, again, read)
    assert read_extra(tmp_path) == {}
    equal(load_scorer(tmp_path)[1], read)


def test_a_classifier_that_transformers_knows_is_written_for_it(tmp_path):
    scorer = ClassifierSettings(DECODER, LABELS, has_bias=False).build(23)
    params = moved(scorer.init(jax.random.key(0)))
    save_scorer(tmp_path, scorer, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = theirs(torch.as_tensor(np.array(TOKENS[:1], np.int64))).logits
    np.testing.assert_allclose(scorer.apply(params, TOKENS[:1], MASK[:1]), logits, atol=1e-5)


def test_a_classifier_begins_as_the_language_model_of_a_folder(tmp_path):
    untied = DecoderConfig(**{**vars(DECODER), "tie_embeddings": False})
    model = untied.build(23)
    save_pretrained(tmp_path, model, model.init(jax.random.key(3)))
    scorer = ClassifierSettings(Pretrained(str(tmp_path)), LABELS).build(23)
    assert isinstance(scorer, PretrainedClassifier)
    params = scorer.init(jax.random.key(0))
    kept = {name: part for name, part in load_pretrained(tmp_path)[1].items() if name != "lm_head"}
    equal({name: part for name, part in params.items() if name != "score"}, kept)
    assert scorer.apply(params, TOKENS, MASK).shape == (2, 2)
    save_scorer(tmp_path / "out", scorer, params)
    again, read = load_scorer(tmp_path / "out")
    assert isinstance(again, Classifier)
    np.testing.assert_array_equal(again.apply(read, TOKENS, MASK), scorer.apply(params, TOKENS, MASK))


def test_the_head_trains_beside_adapters_and_alone_above_a_frozen_body(tmp_path):
    adapted = SCORERS["classifier with adapters"].build(23)
    trained, base = split(adapted.init(jax.random.key(0)))
    assert "score" in trained["lora"]
    assert "score" not in base
    encoder = Encoder(ENCODER)
    save_encoder(tmp_path, encoder, encoder.init(jax.random.key(1)))
    frozen = EncoderScorerSettings(labels=LABELS, path=str(tmp_path), freeze=True).build(23)
    params = moved(frozen.init(jax.random.key(0)))
    trained, base = split(params)
    assert set(trained["lora"]) == {"score"}
    assert not any("score" in name for name in base)
    gradient = jax.grad(lambda p: frozen.apply(p, TOKENS, MASK).sum())(params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(split(gradient)[1]))
    save_scorer(tmp_path / "out", frozen, params)
    again, read = load_scorer(tmp_path / "out")
    np.testing.assert_array_equal(again.apply(read, TOKENS, MASK), frozen.apply(params, TOKENS, MASK))


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
    np.testing.assert_allclose(scorer.apply(params, TOKENS, MASK), logits, atol=1e-5)


def test_a_parameter_too_few_or_too_many_is_named(tmp_path):
    scorer = SCORERS["ngrams"].build(23)
    save_scorer(tmp_path, scorer, scorer.init(jax.random.key(0)))
    weights = load_file(tmp_path / "model.safetensors")
    bias = weights.pop("score/bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="parameter 'score/bias' is missing"):
        load_scorer(tmp_path)
    save_file({**weights, "score/bias": bias, "score/more": bias}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="parameter 'score/more' has no place"):
        load_scorer(tmp_path)
    save_file({**weights, "score/bias": bias[:1]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'score/bias' must be float \[2\], got float32 \[1\]"):
        load_scorer(tmp_path)
    broken = scorer.init(jax.random.key(0))
    broken["score"]["bias"] = jnp.asarray([0.0, jnp.nan])
    with pytest.raises(UserError, match="'score/bias' holds NaN"):
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
