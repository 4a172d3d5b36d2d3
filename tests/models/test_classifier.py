"""``*ForSequenceClassification`` of decoder families against `transformers`, in and out."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.classifier import Classifier, architecture_of, load_classifier, save_classifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained

VOCAB, PAD = 31, 30
LABELS = ("bad", "fair", "good")
SMALL = {
    "gpt2": dict(n_layer=2, n_embd=16, n_head=2, n_positions=24),
    "llama": dict(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        max_position_embeddings=24, tie_word_embeddings=False,
    ),
    # the score reads what the narrow embedding is mapped back to
    "opt": dict(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, ffn_dim=24, max_position_embeddings=24,
        word_embed_proj_dim=8, do_layer_norm_before=False, dropout=0.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SMALL)
def theirs(request, tmp_path_factory):
    """(their model, the folder it was saved to)"""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, **SMALL[request.param], vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None,
        eos_token_id=None, id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)}, problem_type="multi_label_classification",
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def _rows(left):
    """Rows of 12, 7 and 1 tokens, padded on one side."""
    tokens = np.random.default_rng(0).integers(0, PAD, (3, 12))
    lengths = np.array([[12], [7], [1]])
    mask = np.arange(12)[None] >= 12 - lengths if left else np.arange(12)[None] < lengths
    return np.where(mask, tokens, PAD), mask


def _their_logits(model, tokens, mask):
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask.astype(np.int64))}
    if model.config.model_type != "opt":  # it counts the positions itself
        inputs["position_ids"] = torch.as_tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def test_logits_equal_those_of_transformers_wherever_the_padding_is(theirs, tmp_path):
    model, folder = theirs
    classifier, params = load_classifier(folder)
    assert (classifier.labels, classifier.num_labels) == (LABELS, 3)
    assert "lm_head" not in params
    apply = jax.jit(classifier.apply)
    for left in (True, False):
        tokens, mask = _rows(left)
        logits = apply(params, jnp.asarray(tokens), jnp.asarray(mask))
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, _their_logits(model, tokens, mask), rtol=1e-5, atol=1e-5)
    unpadded = apply(params, jnp.asarray(tokens[:1]), None)
    np.testing.assert_allclose(unpadded, logits[:1], rtol=1e-5, atol=1e-5)

    save_classifier(tmp_path, classifier, params, pad_id=PAD)
    auto = transformers.AutoModelForSequenceClassification
    back, loading = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (type(back), back.config.architectures) == (type(model), model.config.architectures)
    assert back.config.id2label == dict(enumerate(LABELS))
    assert back.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert back.config.problem_type == "multi_label_classification"
    np.testing.assert_array_equal(_their_logits(back.eval(), tokens, mask), _their_logits(model, tokens, mask))


@pytest.fixture
def value_model():
    config = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16, vocab_size=11)
    classifier = Classifier(config, has_bias=True)
    params = classifier.init(jax.random.key(0))
    params["score"]["bias"] = jnp.asarray([0.1])
    return classifier, params


def test_language_models_and_classifiers_are_not_mistaken_for_each_other(value_model, tmp_path):
    classifier, params = value_model
    save_classifier(tmp_path, classifier, params)
    with pytest.raises(UserError, match="not a language model: read it with load_classifier"):
        load_pretrained(tmp_path)
    backbone = {name: leaf for name, leaf in params.items() if name != "score"}
    save_pretrained(tmp_path, classifier.backbone, backbone)
    message = "holds a model GPT2LMHeadModel, not a classifier: read it with load_pretrained"
    with pytest.raises(UserError, match=message):
        load_classifier(tmp_path)


def test_a_bias_comes_back_exactly_and_transformers_leaves_it_out(value_model, tmp_path):
    classifier, params = value_model
    save_classifier(tmp_path, classifier, params, pad_id=10)
    again, loaded = load_classifier(tmp_path)
    assert (again.labels, again.has_bias, again.config.family) == (("LABEL_0",), True, "gpt2")
    assert again.config.resolved() == replace(classifier.config.resolved(), family="gpt2")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = np.array([[1, 2, 3, 4]])
    ours = classifier.apply(params, jnp.asarray(tokens))
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(ours - 0.1, back(torch.as_tensor(tokens)).logits, atol=1e-6)
    params["score"]["bias"] = jnp.asarray([jnp.nan])
    with pytest.raises(UserError, match="parameter 'score/bias' holds NaN or infinity"):
        save_classifier(tmp_path, classifier, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_bias": [1.0, 2.0]}, "score_bias must be 1 numbers, got [1.0, 2.0]"),
        ({"score_bias": "x"}, "score_bias must be 1 numbers, got 'x'"),
        ({"id2label": {"1": "a"}}, "id2label must number the labels from 0, got ['1']"),
        ({"id2label": None}, "gives score/kernel the shape [8, 1], the config says [8, 2]"),
        ({"architectures": None}, "holds a model of unknown kind, not a classifier"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(value_model, tmp_path, changes, message):
    save_classifier(tmp_path, *value_model)
    path = tmp_path / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        load_classifier(tmp_path)
    assert message in str(caught.value)


def test_every_family_with_such_a_class_is_known_by_name_and_the_others_say_so():
    without = {"olmoe", "granite", "cohere", "ernie4_5"}
    for model_type, family in FAMILIES.items():
        table = family.table(DecoderConfig()) if callable(family.table) else family.table
        assert table["score"] == "score"
        assert "score" in family.heads
        if model_type not in without:
            assert hasattr(transformers, architecture_of(model_type))
    for model_type in without:
        with pytest.raises(UserError, match=f"transformers has no ForSequenceClassification for {model_type}"):
            architecture_of(model_type)
