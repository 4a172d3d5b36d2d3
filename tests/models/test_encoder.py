"""BERT, RoBERTa, DistilBERT against `transformers`: states, heads, loss, every gradient, and the way back."""

import json
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from hybrid_jax.core.errors import UserError
from hybrid_jax.models.encoder import Encoder, EncoderConfig
from hybrid_jax.models.families.encoders import ENCODERS
from hybrid_jax.models.families.family import dump_weights, parameter_shapes
from hybrid_jax.models.folders.encoder import load_encoder, save_encoder
from hybrid_jax.models.pooling import Mode, Pooling

VOCAB, LABELS = 61, 3
_BERT = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
_DISTIL = {"n_layers": 1, "dim": 32, "n_heads": 4, "hidden_dim": 48}
SIZES = {"Bert": _BERT, "Roberta": _BERT, "XLMRoberta": _BERT | {"type_vocab_size": 1}, "DistilBert": _DISTIL}
CASES = [
    *("BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"),
    *("RobertaForSequenceClassification", "RobertaForTokenClassification", "XLMRobertaModel"),
    *("DistilBertModel", "DistilBertForSequenceClassification", "DistilBertForQuestionAnswering"),
]
MASK = np.arange(12)[None] < np.array([[12], [7], [3]])  # padded at the right, as encoders are
TOKENS = np.where(MASK, np.random.default_rng(0).integers(3, VOCAB, MASK.shape), 1)
TYPES = (np.arange(12)[None] >= np.array([[5], [2], [3]])) & MASK
STATES = np.random.default_rng(1).normal(size=(*MASK.shape, 32)).astype(np.float32)  # weights of a loss on them


@dataclass
class Case:
    theirs: Any
    folder: Any
    model: Encoder
    params: Any

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        types = {"token_type_ids": TYPES} if self.theirs.config.model_type == "bert" else {}
        return {"input_ids": TOKENS, "attention_mask": MASK, **types}


@pytest.fixture(scope="session", params=CASES)
def case(request, tmp_path_factory):
    name = request.param
    cls = getattr(transformers, name)
    prefix = name.removesuffix("Model").partition("For")[0]
    labels = {} if "Question" in name or name.endswith("Model") else {"num_labels": LABELS}
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 20, **SIZES[prefix], **labels}
    sizes |= {"num_hidden_layers": 2} if name == "BertModel" else {}
    theirs = cls(cls.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder)
    return Case(theirs, folder, *load_encoder(folder))


def _their_outputs(theirs, inputs) -> list[torch.Tensor]:
    """Hidden states (and the pooled one), or the scores of the head as ours has them."""
    out = theirs(**{name: torch.as_tensor(array).long() for name, array in inputs.items()})
    if hasattr(out, "start_logits"):
        return [torch.stack([out.start_logits, out.end_logits], -1)]
    if hasattr(out, "logits"):
        return [out.logits]
    return [out.last_hidden_state, *([out.pooler_output] if "pooler_output" in out else [])]


def _our_outputs(case: Case, params) -> list[jax.Array]:
    model, inputs = case.model, {name: jnp.asarray(array) for name, array in case.inputs.items()}
    mask, types = inputs["attention_mask"], inputs.get("token_type_ids")
    types = None if types is None else types.astype(jnp.int32)
    if model.config.head is not None:
        return [model.logits(params, inputs["input_ids"], mask, types)]
    hidden = model.hidden(params, inputs["input_ids"], mask, types)
    return [hidden, *([model.pooled(params, hidden, mask)] if model.config.pooler else [])]


def _loss(outputs, head, xp):
    """One number of the outputs, in numpy's words: `xp` is torch or jax.numpy; nothing of padding counts."""
    nll = lambda scores: xp.log(xp.exp(scores).sum(-1)) - scores[..., 0]  # noqa: E731  of class 0
    as_array = torch.as_tensor if xp is torch else jnp.asarray
    match head:
        case None:
            weights, mask = as_array(STATES), as_array(MASK)[..., None]
            hidden = (xp.where(mask, outputs[0], as_array(np.float32(0))) * weights).sum()
            return hidden + (outputs[1] * weights[:, 0]).sum() if len(outputs) > 1 else hidden
        case "sequence":
            return nll(outputs[0]).mean()
        case "token":
            return (nll(outputs[0]) * as_array(MASK.astype(np.float32))).sum() / MASK.sum()
    scores = xp.where(as_array(MASK)[..., None], outputs[0], as_array(np.float32(-1e30)))
    return (nll(scores[..., 0]) + nll(scores[..., 1])).mean()


def test_outputs_loss_and_all_gradients_equal_those_of_transformers(case):
    def loss(params):
        outputs = _our_outputs(case, params)
        return _loss(outputs, case.model.config.head, jnp), outputs

    (value, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    theirs = _their_outputs(case.theirs, case.inputs)
    for mine, their in zip(ours, theirs, strict=True):
        mine, their = np.asarray(mine), their.detach().numpy()
        assert mine.shape == their.shape
        where = MASK if mine.shape[:2] == MASK.shape else slice(None)
        np.testing.assert_allclose(mine[where], their[where], atol=2e-5, rtol=1e-4)
    their_loss = _loss(theirs, case.model.config.head, torch)
    their_loss.backward()
    assert float(value) == pytest.approx(their_loss.item(), rel=1e-5)
    family = ENCODERS[case.theirs.config.model_type]
    family = family if case.model.config.head else replace(family, prefix="")
    named = dict(dump_weights(family, case.model, gradients))
    their_gradients = {name: p.grad.numpy() for name, p in case.theirs.named_parameters()}
    assert named.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        largest = np.abs(gradient).max()
        # the keys' biases have gradient 0: a softmax does not see a constant
        assert np.abs(named[name] - gradient).max() <= 1e-4 * largest + 1e-6, name


def test_an_exported_folder_gives_transformers_the_same_model(case, tmp_path):
    save_encoder(tmp_path, case.model, case.params)
    back, loading = type(case.theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        for mine, their in zip(
            _their_outputs(back.eval(), case.inputs), _their_outputs(case.theirs, case.inputs), strict=True
        ):
            np.testing.assert_array_equal(mine, their)
    again, params = load_encoder(tmp_path)
    assert again == case.model
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


# ----------------------------------------------------------------------------------- without transformers

# As in a run, since the tolerance is a few roundings.
THOROUGHLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
CONFIG = EncoderConfig(vocab_size=VOCAB, num_layers=2, width=16, num_heads=2, max_length=20, init_std=0.3)


@pytest.fixture(scope="module")
def small():
    model, random = Encoder(CONFIG), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    return model, params, jax.jit(model.hidden, compiler_options=THOROUGHLY)


@pytest.mark.parametrize(
    ("model_type", "content", "size"),
    [
        ("bert", {}, 109_482_240),  # bert-base-uncased
        ("roberta", {"max_position_embeddings": 514, "type_vocab_size": 1}, 124_645_632),  # roberta-base
        ("distilbert", {}, 66_362_880),  # distilbert-base-uncased
    ],
)
def test_real_models_have_as_many_parameters_as_published(model_type, content, size):
    model = Encoder(ENCODERS[model_type].read_config(content))
    assert sum(leaf.size for leaf in parameter_shapes(model).values()) == size


def test_padding_on_either_side_and_packing_change_nothing(small):
    _, params, hidden = small
    row = TOKENS[0, :5]
    other = TOKENS[0, 5:9]
    rows = np.zeros((4, 9), np.int32)
    rows[0, :5], rows[1, 4:], rows[2, :4], rows[3] = row, row, other, [*row, *other]
    segments = np.zeros((4, 9), np.int32)
    segments[0, :5], segments[1, 4:], segments[2, :4], segments[3] = 1, 1, 1, [1] * 5 + [2] * 4
    states = np.asarray(hidden(params, jnp.asarray(rows), jnp.asarray(segments)))
    np.testing.assert_allclose(states[1, 4:], states[0, :5], atol=1e-6)
    np.testing.assert_allclose(states[3, :5], states[0, :5], atol=1e-6)
    np.testing.assert_allclose(states[3, 5:], states[2, :4], atol=1e-6)
    assert np.abs(states[3, 5:] - states[0, :4]).max() > 0.1  # else the rows would say nothing


def test_poolings_are_those_of_plain_python():
    hidden = np.array([[[1.0, -5.0], [3.0, -2.0], [99.0, 99.0]], [[99.0, 99.0], [-4.0, 3.0], [0.0, 5.0]]])
    mask = np.array([[True, True, False], [False, True, True]])
    expected: dict[Mode, Any] = {
        "mean": [[2, -3.5], [-2, 4]],
        "cls": [[1, -5], [-4, 3]],
        "max": [[3, -2], [0, 5]],
    }
    for mode, rows in expected.items():
        got = Pooling(mode, normalize=False)(jnp.asarray(hidden), jnp.asarray(mask))
        np.testing.assert_allclose(got, rows)
        unit = Pooling(mode)(jnp.asarray(hidden), jnp.asarray(mask))
        np.testing.assert_allclose(unit, [np.array(row) / np.hypot(*row) for row in rows], rtol=1e-6)
    nothing = Pooling()(jnp.asarray(hidden), jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(nothing, 0.0)


def test_each_dropout_acts_only_where_a_key_is_given():
    tokens = jnp.asarray(TOKENS)
    still = replace(CONFIG, num_layers=1, head="sequence", labels=("a", "b"))
    params = Encoder(still).init(jax.random.key(0))
    program = str(jax.make_jaxpr(Encoder(still).logits)(params, tokens))
    for rate in ("dropout", "attention_dropout", "head_dropout"):
        model = Encoder(replace(still, **{rate: 0.5}))
        assert str(jax.make_jaxpr(model.logits)(params, tokens)) == program
        with_key = jax.jit(lambda key, model=model: model.logits(params, tokens, dropout_key=key))
        assert np.abs(with_key(jax.random.key(1)) - with_key(jax.random.key(2))).max() > 1e-3, rate


def test_head_dropout_keeps_the_mean():
    model = Encoder(replace(CONFIG, head_dropout=0.25))
    dropped = model._drop(jnp.ones(40_000), jax.random.key(0))
    assert sorted(set(np.asarray(dropped).tolist())) == [0.0, pytest.approx(4 / 3)]
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("pooling", [Pooling(), Pooling("max", normalize=False, max_length=8)])
def test_a_folder_of_sentence_transformers_keeps_its_pooling(small, tmp_path, pooling):
    _, params, _ = small
    model = Encoder(CONFIG, pooling)
    save_encoder(tmp_path, model, params)
    names = [
        module["type"].rpartition(".")[2] for module in json.loads((tmp_path / "modules.json").read_text())
    ]
    assert names == ["Transformer", "Pooling", "Normalize"][: 3 if pooling.normalize else 2]
    again, _ = load_encoder(tmp_path)
    assert again.max_length == model.max_length == (pooling.max_length or 20)
    assert again.pooling == replace(pooling, max_length=model.max_length)
    written = (tmp_path / "modules.json").read_text()
    for content, said in {
        "[" * 50_000: "not JSON|more than 100",
        '[{"type": 3}]': "every module must have a type",
        '["a"]': "every module must have a type",
        '[{"type": "a.Pooling", "path": "../x"}]': "path of a module must lie beside it, got '../x'",
        '[{"type": "a.Pooling", "path": 3}]': "path of a module must lie beside it, got 3",
    }.items():
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(UserError, match=rf"modules\.json: (the )?({said})"):
            load_encoder(tmp_path)
    (tmp_path / "modules.json").write_text(written)
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"pooling_mode": "cls", "embedding_dimension": 16}))
    assert load_encoder(tmp_path)[0].pooling == Pooling("cls", pooling.normalize, model.max_length)
    path.write_text(json.dumps({"pooling_mode_mean_sqrt_len_tokens": True}))
    with pytest.raises(UserError, match=r"1_Pooling/config\.json: the pooling must be one of mean, cls, max"):
        load_encoder(tmp_path)


def test_files_of_old_names_and_of_pre_training_give_the_encoder_alone(small, tmp_path):
    _, params, _ = small
    save_encoder(tmp_path, Encoder(CONFIG), params)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["add_pooling_layer"]
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["BertForMaskedLM"]}))
    tensors = load_file(tmp_path / "model.safetensors")
    old = {"weight": "gamma", "bias": "beta"}
    renamed = {"cls.predictions.bias": np.zeros(VOCAB, np.float32)}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if not name.startswith("pooler"):
            renamed[f"bert.{stem}.{old[leaf] if stem.endswith('LayerNorm') else leaf}"] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    model, loaded = load_encoder(tmp_path)
    assert (model.config.head, model.config.pooler) == (None, False)
    jax.tree.map(np.testing.assert_array_equal, loaded, {k: v for k, v in params.items() if k != "pooler"})
    save_encoder(tmp_path / "again", model, loaded)
    assert load_encoder(tmp_path / "again")[0] == model
    del renamed["bert.encoder.layer.1.output.LayerNorm.gamma"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'bert\.encoder\.layer\.1\.output\.LayerNorm\.weight' is missing"):
        load_encoder(tmp_path)


def test_mistakes_are_one_clear_line(small, tmp_path):
    model, params, _ = small
    with pytest.raises(UserError, match="at most max_length 20 tokens, got 21"):
        model.hidden(params, jnp.zeros((1, 21), jnp.int32))
    with pytest.raises(UserError, match="has no head"):
        model.logits(params, jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(UserError, match="token_types must be None"):
        Encoder(replace(CONFIG, token_types=0)).hidden(params, jnp.asarray(TOKENS), None, jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match="labels must name the classes for head 'token'"):
        replace(CONFIG, head="token")
    with pytest.raises(ValueError, match="pooler must be true"):
        replace(CONFIG, head="sequence", labels=("a",), pooler=False)
    with pytest.raises(UserError, match="position_offset must be 0 for a bert export, got 3"):
        save_encoder(tmp_path, Encoder(replace(CONFIG, position_offset=3, family="bert")), params)
    save_encoder(tmp_path, model, params)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"architectures": ["BertForMultipleChoice"]}))
    with pytest.raises(
        UserError, match=r"architectures must be one of BertModel, .*got 'BertForMultipleChoice'"
    ):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": "berd"}))
    with pytest.raises(UserError, match=r"unknown model_type 'berd'; .*bert"):
        load_encoder(tmp_path)
