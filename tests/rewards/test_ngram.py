import gzip
import json
import math
import os
import random

import numpy as np
import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.metrics.text import words
from hybrid_jax.rewards import ngram
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.ngram import DomainRelevance, NgramFluency

SEA = "the sea is wide . the ship sails over the sea . the wind is cold ."
TOWN = "the town is old . the street leads through the town . the house is tall ."


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "sea.txt").write_text(SEA)
    (tmp_path / "town.jsonl").write_text(json.dumps({"body": TOWN}) + "\n")
    return tmp_path / "sea.txt", tmp_path / "town.jsonl"


def score(reward, *responses):
    return evaluate_reward("part", reward, [""] * len(responses), responses).tolist()


def test_fluency_is_the_mean_log_probability_of_a_token(texts):
    """Unigrams: 'the' is 4 of 18 tokens, there are 11 different ones and the unknown: V = 12."""
    (value, blind, strange) = score(NgramFluency(texts[0], order=1, unit="word"), "The sea", "", "漢")
    tokens = SEA.split()
    share, size = len(set(tokens)) / (len(tokens) + len(set(tokens))), len(set(tokens)) + 1
    the, sea = ((1 - share) * tokens.count(w) / len(tokens) + share / size for w in ("the", "sea"))
    assert value == pytest.approx((math.log(the) + math.log(sea)) / 2, rel=1e-6)
    assert blind == pytest.approx(-math.log(size), rel=1e-6)
    assert strange == pytest.approx(math.log(share / size), rel=1e-6)


def test_fluent_text_is_likelier_than_shuffled_text(texts):
    fluent, shuffled, other = score(NgramFluency(texts[0]), "the ship is cold", "hsp it d ihelsoc", "🙂漢字")
    assert fluent > shuffled > other


def test_a_model_is_trained_once_until_its_text_changes(texts):
    reward = NgramFluency(texts[0])
    ngram._models.cache_clear()
    first = score(reward, "the sea")
    assert score(reward, "the sea") == first
    assert ngram._models.cache_info().misses == 1
    texts[0].write_text("something else")
    os.utime(texts[0], ns=(1, 1))
    assert score(reward, "the sea") != first


def test_relevance_is_the_difference_of_the_two_models_and_antisymmetric(texts):
    sea, town = texts[0], texts[1].with_name("town.txt")
    town.write_text(TOWN)
    responses = ["the sea and the wind", "an old street", "the", "", "漢字 🙂"]
    for order in (1, 3):
        there = score(DomainRelevance(sea, town, order=order), *responses)
        back = score(DomainRelevance(town, sea, order=order), *responses)
        assert there == [-value for value in back]
        assert there[0] > 0 > there[1]
        assert there[3] == 0.0


def test_both_models_share_the_vocabulary_of_both_texts(texts):
    """'street' is unknown at sea: there it has the uniform share of the words of both texts and the unknown."""
    sea, town = SEA.split(), TOWN.split()
    size = len({*sea, *town}) + 1
    shares = [len(set(tokens)) / (len(tokens) + len(set(tokens))) for tokens in (sea, town)]
    at_sea, in_town = shares[0] / size, (1 - shares[1]) / len(town) + shares[1] / size
    texts[1].with_name("town.txt").write_text(TOWN)
    (value,) = score(DomainRelevance(texts[0], texts[1].with_name("town.txt")), "street")
    assert value == pytest.approx(math.log(at_sea) - math.log(in_town), rel=1e-6)


def test_files_of_rows_need_their_field(texts):
    assert score(DomainRelevance(texts[1], texts[1], field="body"), "the town") == [0.0]
    with pytest.raises(UserError, match=r"town.jsonl:1: .*'text'"):
        score(NgramFluency(texts[1]), "a")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt cannot be read: No such file or directory"):
        score(NgramFluency(tmp_path / "none.txt"), "a")
    with pytest.raises(UserError, match=r"order must be in \[1, 20\], got 0"):
        parse(NgramFluency, {"path": "x", "order": 0})


@pytest.mark.slow
def test_relevance_tells_film_reviews_from_wikipedia(shared_data, tmp_path):
    """0.9947 measured; 800 + 800 held-out documents cut to 60 words."""
    from sklearn.metrics import roc_auc_score

    def reviews(part):
        with gzip.open(shared_data / "imdb_full" / f"{part}.jsonl.gz", "rt") as file:
            rows = [json.loads(line)["text"].replace("<br />", " ") for line in file]
        random.Random(0).shuffle(rows)
        return rows[:800]

    def articles(*parts):
        files = [shared_data / "wikitext2" / f"{part}.txt" for part in parts]
        lines = [line for file in files for line in file.read_text().split("\n")]
        marks = {"<unk>": " ", "@-@": "-", "@,@": ",", "@.@": "."}
        for mark, plain in marks.items():
            lines = [line.replace(mark, plain) for line in lines]
        return [line for line in lines if len(words(line)) >= 60][:1000]

    (tmp_path / "in.txt").write_text("\n".join(reviews("train")))
    (tmp_path / "general.txt").write_text("\n".join(articles("train")))
    held_out = [" ".join(words(text)[:60]) for text in reviews("test") + articles("test", "validation")[:800]]
    assert len(held_out) == 1600
    scores = score(DomainRelevance(tmp_path / "in.txt", tmp_path / "general.txt"), *held_out)
    assert roc_auc_score(np.arange(1600) < 800, scores) == pytest.approx(0.994, abs=0.01)
