"""T5 1.0 and 1.1 against `transformers`: scores, loss, every gradient, decoding, the way back."""

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
from transformers.models.t5.modeling_t5 import T5Attention

from hybrid_jax.algorithms.log_probs import token_log_probs
from hybrid_jax.core.batches import TokenBatch
from hybrid_jax.core.errors import UserError
from hybrid_jax.models.base import BACKBONES, LanguageModel
from hybrid_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from hybrid_jax.models.encoder_decoder_blocks import relative_buckets
from hybrid_jax.models.families.family import dump_weights, parameter_shapes
from hybrid_jax.models.families.t5 import T5
from hybrid_jax.models.folders.encoder_decoder import load_encoder_decoder, save_encoder_decoder
from hybrid_jax.phases.sft import sft_losses
from hybrid_jax.sampling.ancestral import generate

VOCAB, START = 61, 2
SIZES = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": VOCAB}
SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
VERSIONS = {
    "1.0": {"feed_forward_proj": "relu", "num_decoder_layers": 1},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
SOURCES, TARGETS = np.array([12, 7, 3]), np.array([8, 5, 9])  # lengths
_random = np.random.default_rng(0)
PAIRS = [
    (_random.integers(3, VOCAB, n).tolist(), _random.integers(3, VOCAB, m).tolist())
    for n, m in zip(SOURCES, TARGETS, strict=True)
]


@dataclass
class Case:
    theirs: Any
    folder: Any
    model: EncoderDecoder
    params: Any
    apply_pairs: Any  # compiled


@pytest.fixture(scope="session", params=VERSIONS)
def case(request, tmp_path_factory):
    torch.manual_seed(0)
    settings: Any = {**SIZES, **VERSIONS[request.param], "decoder_start_token_id": START}
    config = transformers.T5Config(**settings)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    if request.param == "1.1":  # with a head of its own, as the published ones have
        theirs.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(VOCAB, 32))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    model, params = load_encoder_decoder(folder)
    return Case(theirs, folder, model, params, jax.jit(model.apply_pairs))


def _padded(sequences, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask)"""
    length = max(map(len, sequences))
    tokens, mask = np.zeros((len(sequences), length), np.int32), np.zeros((len(sequences), length), bool)
    for row, sequence in enumerate(sequences):
        here = slice(length - len(sequence), None) if left else slice(len(sequence))
        tokens[row, here], mask[row, here] = sequence, True
    return tokens, mask


def _rows(rows) -> TokenBatch:
    """Rows of pairs, one behind the other."""
    tokens, segments = [], []
    for pairs in rows:
        parts = [part for pair in pairs for part in pair]
        tokens.append([token for part in parts for token in part])
        segments.append([i for i, part in enumerate(parts, start=1) for _ in part])
    ids = _padded(segments)[0]
    arrays: Any = {"tokens": _padded(tokens)[0], "segment_ids": ids, "loss_mask": (ids > 0) & (ids % 2 == 0)}
    return TokenBatch(**jax.tree.map(jnp.asarray, arrays))


def _their_scores(theirs) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores of the target tokens, mean loss)"""
    (source, source_mask), (target, mask) = _padded([p[0] for p in PAIRS]), _padded([p[1] for p in PAIRS])
    labels = torch.as_tensor(np.where(mask, target, -100)).long()
    inputs = {"input_ids": torch.as_tensor(source), "attention_mask": torch.as_tensor(source_mask).long()}
    out = theirs(**inputs, labels=labels)
    return out.logits, out.loss


def test_buckets_are_those_of_transformers():
    distance = np.arange(-300, 300)[None]
    for count, farthest in ((32, 128), (8, 20), (16, 50)):
        for both_ways in (True, False):
            expected = T5Attention._relative_position_bucket(
                torch.as_tensor(distance), both_ways, count, farthest
            )
            got = relative_buckets(jnp.asarray(distance), count, farthest, both_ways)
            np.testing.assert_array_equal(got, expected.numpy())


def test_scores_loss_and_all_gradients_equal_those_of_transformers(case):
    model, batch = case.model, _rows([[pair] for pair in PAIRS])

    def loss(params):
        total = sft_losses(model, params, batch)["loss"]
        return total.mean(), model.apply(params, batch.tokens, batch.segment_ids).logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    their_logits, their_loss = _their_scores(case.theirs)
    case.theirs.zero_grad()
    their_loss.backward()
    assert float(value) == pytest.approx(their_loss.item(), rel=1e-5)
    for row, (source, target) in enumerate(PAIRS):
        before = slice(len(source) - 1, len(source) + len(target) - 1)
        expected = their_logits[row, : len(target)].detach().numpy()
        np.testing.assert_allclose(logits[row, before], expected, atol=1e-4, rtol=1e-4)
    named = dict(dump_weights(T5, model, gradients))
    their_gradients = {name: p.grad.numpy() for name, p in case.theirs.named_parameters()}
    assert named.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert np.abs(named[name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


def test_pairs_apart_padded_on_either_side_or_packed_in_rows_have_the_same_scores(case):
    model, params = case.model, case.params
    expected = _their_scores(case.theirs)[0].detach().numpy()
    for left in (False, True):
        source, target = _padded([p[0] for p in PAIRS], left), _padded([p[1] for p in PAIRS], left)
        logits = np.asarray(case.apply_pairs(params, *map(jnp.asarray, (*source, *target))).logits)
        for row, length in enumerate(TARGETS):
            own = logits[row, -length:] if left else logits[row, :length]
            np.testing.assert_allclose(own, expected[row, :length], atol=1e-4, rtol=1e-4)
    packed = _rows([PAIRS])
    logits = jax.jit(model.apply)(params, packed.tokens, packed.segment_ids).logits[0]
    ends = np.cumsum(SOURCES + TARGETS)
    for row, (end, length) in enumerate(zip(ends, TARGETS, strict=True)):
        own = logits[end - length - 1 : end - 1]
        np.testing.assert_allclose(own, expected[row, :length], atol=1e-4, rtol=1e-4)


def test_greedy_decoding_gives_the_same_32_tokens(case):
    prompts, mask = _padded([p[0] for p in PAIRS], left=True)
    case.theirs.generation_config.eos_token_id = None
    expected = case.theirs.generate(
        input_ids=torch.as_tensor(prompts),
        attention_mask=torch.as_tensor(mask).long(),
        do_sample=False,
        max_new_tokens=32,
    )
    key = jax.random.key(0)
    samples = generate(
        case.model, case.params, jnp.asarray(prompts), jnp.asarray(mask), key, max_new_tokens=32, temperature=0
    )
    np.testing.assert_array_equal(samples.tokens, expected[:, 1:])
    assert len(np.unique(samples.tokens)) > 3


def test_sampled_tokens_have_the_log_probs_of_the_full_forward(case):
    model, params = case.model, case.params
    prompts, mask = map(jnp.asarray, _padded([p[0] for p in PAIRS], left=True))
    samples = generate(model, params, prompts, mask, jax.random.key(1), max_new_tokens=9)
    logits = case.apply_pairs(params, prompts, mask, samples.tokens, samples.action_mask).logits
    np.testing.assert_allclose(samples.log_probs, token_log_probs(logits, samples.tokens), atol=1e-4)


def test_an_exported_folder_gives_transformers_the_same_model(case, tmp_path):
    save_encoder_decoder(tmp_path, case.model, case.params, eos_ids=(1,), pad_id=0)
    back, loading = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (back.config.decoder_start_token_id, back.generation_config.eos_token_id) == (START, 1)
    with torch.no_grad():
        np.testing.assert_array_equal(_their_scores(back.eval())[0], _their_scores(case.theirs)[0])
    again, params = load_encoder_decoder(tmp_path)
    assert again == case.model
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    untied = not case.model.config.tie_embeddings  # as files of before transformers 5 say it
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is not untied


def test_the_two_versions_differ_as_published(case):
    c = case.model.config
    first = c.mlp == "plain"
    assert (c.activation, c.tie_embeddings, c.scale_outputs) == (
        ("relu", True, True) if first else ("gelu_tanh", False, False)
    )
    assert (c.num_layers, c.decoder_layers, c.start_id) == (2, 1 if first else 2, START)


# ----------------------------------------------------------------------------------------- without transformers

CONFIG = EncoderDecoderConfig(num_layers=1, width=16, num_heads=2, num_buckets=8, max_distance=20)


@pytest.mark.parametrize(
    ("content", "tied", "size"),
    [
        ({}, True, 60_506_624),  # t5-small
        (
            {
                "d_model": 768,
                "d_ff": 2048,
                "num_layers": 12,
                "num_heads": 12,
                "feed_forward_proj": "gated-gelu",
            },
            False,
            247_577_856,  # flan-t5-base
        ),
    ],
)
def test_real_models_have_as_many_parameters_as_published(content, tied, size):
    config = replace(T5.read_config(content), tie_embeddings=tied)
    assert sum(leaf.size for leaf in parameter_shapes(EncoderDecoder(config)).values()) == size


@pytest.fixture(scope="module")
def small():
    model, random = CONFIG.build(VOCAB), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)


def test_dropout_acts_only_where_a_key_is_given(small):
    model, params = small
    batch = _rows([PAIRS[:1]])
    dropping = replace(CONFIG, dropout=0.3).build(VOCAB)

    def program(model, dropout_key=None):
        tokens, mask = batch.tokens, batch.segment_ids
        return str(jax.make_jaxpr(lambda key: model.hidden(params, tokens, mask, dropout_key=key))(dropout_key))

    assert program(dropping) == program(model)
    # around the layers; in a layer: the weights of each attention, inside the MLP, each branch
    encoder, decoder = 2 + (1 + 1 + 2), 2 + (2 + 1 + 3)
    assert program(dropping, jax.random.key(0)).count("name=_bernoulli") == encoder + decoder


def test_copies_of_the_embedding_in_old_files_load_too(small, tmp_path):
    model, params = small
    save_encoder_decoder(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    again, loaded = load_encoder_decoder(tmp_path)
    assert again.config.tie_embeddings
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tensors["encoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: tensor 'encoder\.embed_tokens\.weight' differs"):
        load_encoder_decoder(tmp_path)


def test_the_backbone_pretrained_encoder_decoder_starts_from_a_folder(small, tmp_path):
    model, params = small
    save_encoder_decoder(tmp_path, model, params)
    built = BACKBONES["pretrained_encoder_decoder"](str(tmp_path), dropout=0.2).build(VOCAB)
    assert isinstance(built, LanguageModel)
    assert isinstance(built, EncoderDecoder)
    assert hash(built) == hash(BACKBONES["pretrained_encoder_decoder"](str(tmp_path), dropout=0.2).build())
    assert built.config == replace(
        model.config, dropout=0.2, family="t5", num_decoder_layers=1, head_width=8, mlp_width=64
    )
    jax.tree.map(np.testing.assert_array_equal, built.init(jax.random.key(1)), params)
    save_encoder_decoder(tmp_path / "again", built, params)
    with pytest.raises(UserError, match="the tokenizer has 99 tokens, more than the 61"):
        BACKBONES["pretrained_encoder_decoder"](str(tmp_path)).build(99)


def test_mistakes_are_one_clear_line(small):
    model, params = small
    tokens = jnp.ones((1, 4), jnp.int32)
    for mask in (None, jnp.ones((1, 4), bool)):
        with pytest.raises(UserError, match="must know where each source ends"):
            model.hidden(params, tokens, mask)
    with pytest.raises(ValueError, match="num_buckets must be even, got 5"):
        replace(CONFIG, num_buckets=5)
    with pytest.raises(ValueError, match=r"max_distance must be more than num_buckets // 2 = 4, got 4"):
        replace(CONFIG, max_distance=4)
    with pytest.raises(ValueError, match="start_id must be a token of the vocabulary, got 61"):
        replace(CONFIG, start_id=61).build(VOCAB)
    with pytest.raises(UserError, match="activation must be"):
        T5.write_config(replace(CONFIG, mlp="gated", activation="gelu", vocab_size=VOCAB))
