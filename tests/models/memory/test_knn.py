"""A model beside a datastore, against a plain loop over all of its pairs."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.lora import DATASTORE, split, whole
from hybrid_jax.models.memory.knn import KnnLMSettings, with_datastore
from hybrid_jax.models.recurrent.elman import Elman
from hybrid_jax.runs.policy import Policy, load_pretrained_policy
from hybrid_jax.sampling.ancestral import Ancestral

V, N, K, SHARE, HEAT = 7, 12, 4, 0.3, 0.7
BASE = Elman(width=5)
PLAIN = BASE.build(V)
PARAMS = PLAIN.init(jax.random.key(0))
random = np.random.default_rng(0)
KEYS, VALUES = random.normal(0, 0.3, (N, 5)), random.integers(0, V, N)
SETTINGS, BESIDE = with_datastore(KnnLMSettings(BASE, 1, SHARE, K, HEAT), PARAMS, KEYS, VALUES)
TOKENS = jnp.asarray(random.integers(0, V, (2, 6)))
MASK = jnp.asarray([[0, 0, 1, 1, 1, 1], [1] * 6])


def knn_store():
    path = Path(__file__).parents[3] / "scripts" / "knn_store.py"
    spec = importlib.util.spec_from_file_location("knn_store", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mixture_is_that_of_a_plain_loop_and_sums_to_one():
    output = jax.jit(PLAIN.apply)(PARAMS, TOKENS, MASK)
    probabilities = np.exp(np.float64(jax.jit(SETTINGS.build(V).apply)(BESIDE, TOKENS, MASK).logits))
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-5)
    for row, t in np.argwhere(np.asarray(MASK)):
        state = np.float64(output.hidden[row, t])
        far = [float(((state - key) ** 2).sum()) for key in np.float32(KEYS)]
        found = np.zeros(V)
        for i in sorted(range(N), key=far.__getitem__)[:K]:
            found[VALUES[i]] += np.exp(-far[i] / HEAT)
        model = np.exp(np.float64(output.logits[row, t]))
        expected = (1 - SHARE) * model / model.sum() + SHARE * found / found.sum()
        np.testing.assert_allclose(probabilities[row, t], expected, atol=2e-6)


def test_without_a_share_it_is_the_model_to_the_bit_and_an_empty_datastore_changes_nothing():
    none = KnnLMSettings(BASE, N, 0.0, K, HEAT).build(V)
    expected = PLAIN.apply(PARAMS, TOKENS, MASK).logits
    np.testing.assert_array_equal(none.apply(BESIDE, TOKENS, MASK).logits, expected)
    cache = none.prefill(BESIDE, TOKENS, MASK > 0, none.init_cache(2, 6))
    plain = PLAIN.prefill(PARAMS, TOKENS, MASK > 0, PLAIN.init_cache(2, 6))
    jax.tree.map(np.testing.assert_array_equal, cache, plain)
    empty = KnnLMSettings(BASE, 3).build(V)
    scores = empty.apply(empty.init(jax.random.key(0)), TOKENS, MASK).logits
    np.testing.assert_allclose(scores, jax.nn.log_softmax(expected), atol=1e-6)


def test_a_datastore_stays_as_it_is_while_the_model_trains():
    trained, stays = split(BESIDE)
    assert trained.keys() == PARAMS.keys()
    assert stays.keys() == {DATASTORE}
    model = SETTINGS.build(V)

    def loss(params):
        return model.apply(whole(stays, params), TOKENS, MASK).logits[:, :, 0].sum()

    assert model.cast(trained).keys() == PARAMS.keys()  # as a run freezes references, of what trains alone
    grads = jax.jit(jax.grad(loss))(trained)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(grads["layer_0"]))


def test_the_script_writes_a_folder_whose_pairs_are_the_states_and_what_followed(tmp_path, capsys):
    tokenizer, text = Bytes().build(), "to be or not to be, that is a"
    model = BASE.build(tokenizer.vocab_size)
    params = model.init(jax.random.key(1))
    policy = Policy(model, params, tokenizer, Ancestral(max_new_tokens=4), (tokenizer.eos_id,), component=BASE)
    policy.save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_text(text)
    where = [
        "--model",
        str(tmp_path / "plain"),
        "--output",
        str(tmp_path / "knn"),
        "--length",
        "8",
        "--batch",
        "2",
    ]
    texts = ["--text", str(tmp_path / "text.txt"), "--held-out", str(tmp_path / "text.txt")]
    knn_store().main([*where, *texts, "--share", "0.5", "--temperature", "0.001"])
    told = capsys.readouterr().out.splitlines()
    read = load_pretrained_policy(tmp_path / "knn")
    ids = tokenizer.encode(text)
    rows = jnp.asarray([ids[start : start + 8] for start in range(0, len(ids) - 1, 7)])
    output = jax.jit(model.apply)(params, rows)
    np.testing.assert_allclose(read.params[DATASTORE]["keys"], output.hidden[:, :-1].reshape(28, 5), atol=1e-6)
    np.testing.assert_array_equal(read.params[DATASTORE]["values"], ids[1:])
    # A state finds itself: half of the mixture knows what follows, so that log 2 is the most that it costs.
    alone, mixture = (float(line.split()[2]) for line in told[1:3])
    log_probs = jax.nn.log_softmax(output.logits[:, :-1])
    nats = -np.take_along_axis(np.asarray(log_probs), np.asarray(rows)[:, 1:, None], axis=-1)
    assert alone == pytest.approx(nats.mean(), abs=2e-4)
    assert 0.6 < mixture < np.log(2)
