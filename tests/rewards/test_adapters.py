"""Adapters to packages that are not here: they say so, and they call the real ones as those are called."""

import re
import sys
from types import SimpleNamespace

import pytest

from hybrid_jax.rewards import adapters
from hybrid_jax.rewards.adapters import Bleurt, Comet, Detoxify
from hybrid_jax.rewards.base import RewardError, evaluate_reward

COLUMNS = {"references": [["a", "bbb"], "cc"], "source": ["s", "t"]}


@pytest.fixture(autouse=True)
def forget():
    for load in (adapters._comet, adapters._bleurt, adapters._detoxify):
        load.cache_clear()


@pytest.mark.parametrize(
    ("kind", "module", "install"),
    [
        (Comet, "comet", "pip install unbabel-comet"),
        (Bleurt, "bleurt", "google-research/bleurt"),
        (Detoxify, "detoxify", "pip install detoxify"),
    ],
)
def test_without_its_package_it_is_one_clear_line_and_nothing_takes_its_place(
    kind, module, install, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = rf"needs {module}, which is not installed: .*{re.escape(install)}"
    with pytest.raises(RewardError, match=message):
        evaluate_reward("x", kind(tmp_path), ["p", "q"], ["x", "y"], COLUMNS)
    with pytest.raises(RewardError, match="checkpoint must be that of a model on this machine"):
        evaluate_reward("x", kind(tmp_path / "none"), ["p", "q"], ["x", "y"], COLUMNS)


def test_each_package_is_asked_row_by_row_and_the_best_reference_counts(tmp_path, monkeypatch):
    def predict(rows, batch_size, gpus):
        assert [row["src"] for row in rows] == ["s", "s", "t"]
        return SimpleNamespace(scores=[len(row["ref"]) - len(row["mt"]) for row in rows])

    def score(references, candidates):
        return [len(r) * len(c) for r, c in zip(references, candidates, strict=True)]

    comet = SimpleNamespace(load_from_checkpoint=lambda path: SimpleNamespace(predict=predict))
    bleurt = SimpleNamespace(BleurtScorer=lambda path: SimpleNamespace(score=score))
    toxic = SimpleNamespace(predict=lambda texts: {"toxicity": [len(text) / 10 for text in texts]})
    detoxify = SimpleNamespace(Detoxify=lambda model_type, checkpoint: toxic)
    for name, module in {
        "comet": comet,
        "bleurt": bleurt,
        "bleurt.score": bleurt,
        "detoxify": detoxify,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    texts = ["p", "q"], ["x", "yy"]
    assert Comet(tmp_path)(*texts, **COLUMNS) == [2.0, 0.0]
    assert Bleurt(tmp_path)(*texts, COLUMNS["references"]) == [3.0, 4.0]
    assert Detoxify(tmp_path)(*texts) == [0.1, 0.2]
    with pytest.raises(RewardError, match="label must be one of toxicity, got 'insult'"):
        evaluate_reward("x", Detoxify(tmp_path, label="insult"), *texts)
