"""What a classifier thinks of a label, against the softmax of its own numbers in plain Python."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.scored_text import encode_scored
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.folders.scorer import save_scorer
from hybrid_jax.models.heads import ClassificationHead
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.rewards.base import RewardError, evaluate_reward
from hybrid_jax.rewards.classifier import ClassifierReward, log_odds

LABELS = ("negative", "neutral", "positive")
TEXTS, SOURCES = ["good film", "", "bad " * 30, "é漢 🙂"], ["a", "b " * 40, "", "d"]
TOKENIZER = Bytes().build([])


@pytest.fixture(scope="module")
def scorer():
    trunk = NGrams(bucket_bits=4, width=3).build(TOKENIZER.vocab_size)
    model = TextScorer(trunk, ClassificationHead(labels=LABELS))
    leaves, shape = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    noise = np.random.default_rng(0)
    return model, jax.tree.unflatten(
        shape, [jnp.asarray(noise.normal(size=x.shape), jnp.float32) for x in leaves]
    )


@pytest.fixture
def folder(scorer, tmp_path):
    save_scorer(tmp_path, *scorer, TOKENIZER.save, {"temperature": 2.0, "reading": {"max_length": 50}})
    return tmp_path


def expected_odds(scorer, before, label, longest, temperature):
    model, params = scorer
    found = []
    for row in encode_scored(TOKENIZER, before, TEXTS, longest):
        logits = np.asarray(model.apply(params, jnp.asarray([row]), jnp.ones((1, len(row)), bool)))[0]
        masses = [math.exp(x / temperature) for x in logits.tolist()]
        p = masses[label] / sum(masses)
        found.append(math.log(p / (1 - p)))
    return found


def test_its_outputs_are_those_of_the_calibrated_softmax(scorer, folder):
    odds = expected_odds(scorer, None, 2, 50, 2.0)
    assert np.ptp(odds) > 0.1
    scores = ClassifierReward(str(folder), "positive")(TEXTS, TEXTS)
    np.testing.assert_allclose(scores, odds, rtol=1e-4, atol=1e-5)
    probabilities = [1 / (1 + math.exp(-x)) for x in odds]
    scores = ClassifierReward(str(folder), 2, output="probability")(TEXTS, TEXTS)
    np.testing.assert_allclose(scores, probabilities, rtol=1e-4)
    scores = ClassifierReward(str(folder), 2, output="log_prob")(TEXTS, TEXTS)
    np.testing.assert_allclose(scores, np.log(probabilities), rtol=1e-4)


def test_it_reads_the_response_behind_its_prompt_or_its_source(scorer, folder):
    odds = expected_odds(scorer, SOURCES, 0, 50, 2.0)
    behind_prompt = ClassifierReward(str(folder), "negative", reads="prompt")(SOURCES, TEXTS)
    np.testing.assert_allclose(behind_prompt, odds, rtol=1e-4, atol=1e-5)
    reward = ClassifierReward(str(folder), "negative", reads="source")
    assert reward([""] * 4, TEXTS, source=SOURCES) == behind_prompt
    with pytest.raises(RewardError, match="the data must have the column 'source', got no columns"):
        evaluate_reward("c", reward, [""], ["a"])


def test_log_odds_stay_apart_where_probabilities_are_all_one():
    logits = np.array([[0.0, 50.0, 1.0], [0.0, 60.0, 1.0]])
    first, second = log_odds(logits, 1)
    assert second - first == pytest.approx(10.0)
    assert first == pytest.approx(50 - math.log(1 + math.e))
    assert log_odds(logits, 1, 2.0, independent=True).tolist() == [25.0, 30.0]
    assert log_odds(logits[:, :1] - 3, 0).tolist() == [-3.0, -3.0]


def test_mistakes_are_one_clear_line(folder):
    with pytest.raises(UserError, match="has no label 'positif'; did you mean 'positive'"):
        ClassifierReward(str(folder), "positif")([], [])
    with pytest.raises(UserError, match=r"label must be below 3, the labels of .*, got 3"):
        ClassifierReward(str(folder), 3)([], [])
    with pytest.raises(ValueError, match="max_length must be at least 8, got 2"):
        ClassifierReward("x", 0, max_length=2)


def test_a_damaged_temperature_is_refused(folder, tmp_path):
    (folder / "extra.json").write_text(json.dumps({"temperature": 0}))
    with pytest.raises(UserError, match="temperature must be a number above 0, got 0"):
        ClassifierReward(str(folder), 0)(["a"], ["b"])
