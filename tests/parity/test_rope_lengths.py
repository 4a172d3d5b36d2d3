"""A row's rotary positions know its own length alone: neither padding nor the sequences beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hybrid_jax.models.folders.hf import load_pretrained

VOCAB, ORIGINAL, ROW, OTHER = 31, 12, 16, 9  # the row is longer than the original length, the other is not
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 7.0], "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SCALINGS)
def models(request, tmp_path_factory):
    """(their model, ours, its parameters)"""
    longest = ORIGINAL if request.param == "dynamic" else 96
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8, vocab_size=VOCAB,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": request.param, "rope_theta": 50.0, **SCALINGS[request.param]},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, *load_pretrained(folder)


def _their_logits(theirs, tokens):
    with torch.no_grad():
        return theirs(input_ids=torch.as_tensor(np.array(tokens))[None], use_cache=False).logits[0].numpy()


def _rows():
    """The row and the other one, and both in rows of 44: (tokens, segment ids, where the row is) of each."""
    random = np.random.default_rng(0)
    row, other = random.integers(0, VOCAB, ROW), random.integers(0, VOCAB, OTHER)
    places = {
        "left": np.arange(28, 44),
        "right": np.arange(16),
        "middle": np.r_[3:8, 20:31],
        "packed": np.arange(9, 25),
    }
    ids = np.zeros((4, 44), int)
    tokens = random.integers(0, VOCAB, ids.shape)
    for i, place in enumerate(places.values()):
        tokens[i, place], ids[i, place] = row, 2
    tokens[3, :OTHER], ids[3, :OTHER] = other, 1
    return row, other, tokens, ids, places


def test_a_row_padded_anywhere_or_packed_scores_as_it_does_alone_in_transformers(models):
    theirs, model, params = models
    row, other, tokens, ids, places = _rows()
    logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray(tokens), jnp.asarray(ids)).logits)
    expected = _their_logits(theirs, row)
    for i, place in enumerate(places.values()):
        np.testing.assert_allclose(logits[i, place], expected, atol=1e-5)
    np.testing.assert_allclose(logits[3, :OTHER], _their_logits(theirs, other), atol=1e-5)


def test_a_prompt_behind_padding_is_read_and_continued_as_alone(models):
    theirs, model, params = models
    row, other, *_ = _rows()
    padded = np.zeros((2, 36), int)
    padded[0, 36 - ROW :], padded[1, 36 - OTHER :] = row, other
    mask = np.arange(36) >= 36 - np.array([[ROW], [OTHER]])
    cache = model.init_cache(2, 40)
    logits, cache = jax.jit(model.prefill)(params, jnp.asarray(padded), jnp.asarray(mask), cache)
    for scores, alone in zip(logits, (row, other), strict=True):
        np.testing.assert_allclose(scores, _their_logits(theirs, alone)[-1], atol=1e-5)
    # transformers goes on from its cache, too: each new token turns by the angles of the length so far
    after, _ = jax.jit(model.step)(params, jnp.array([5, 7]), cache)
    for scores, alone, token in zip(after, (row, other), (5, 7), strict=True):
        with torch.no_grad():
            past = DynamicCache(config=theirs.config)
            theirs(input_ids=torch.as_tensor(alone)[None], cache=past)
            expected = theirs(input_ids=torch.tensor([[token]]), cache=past).logits[0, -1]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
