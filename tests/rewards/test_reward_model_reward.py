"""The reward of trained reward models: scale, ensemble and doubt, against the scorers' own numbers."""

import jax
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.data.preference_stream import Reading
from hybrid_jax.data.scored_text import encode_scored, padded
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.models.folders.scorer import save_scorer
from hybrid_jax.models.heads import RegressionHead
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.rewards.reward_model import RewardModelReward

TOKENIZER = Bytes(chat_template="chatml").build([])
PROMPTS = ["What is tea?", "And bread?", "Why?"]
RESPONSES = ["A drink of leaves.", "", "Because it rises. " * 9]
TRUNK = NGrams(bucket_bits=4, width=3).build(TOKENIZER.vocab_size)
MODEL = TextScorer(TRUNK, RegressionHead(labels=("first", "second")))
SCALES = {"mean": [0.3, -1.0], "std": [0.5, 2.0]}


@pytest.fixture(scope="module")
def params():
    make = jax.jit(lambda key: jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), MODEL.init(key)))
    return make(jax.random.key(0)), make(jax.random.key(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, params):
    """A model that reads prompts, one that reads the chat template, one that says nothing of itself."""
    extras = [
        {"reading": Reading(max_length=64).settings, "normaliser": SCALES},
        {"reading": Reading(chat=True, max_length=64).settings, "normaliser": SCALES},
        None,
    ]
    made = []
    for extra, tree in zip(extras, (*params, params[0]), strict=True):
        made.append(str(tmp_path_factory.mktemp("model")))
        save_scorer(made[-1], MODEL, tree, TOKENIZER.save, extra)
    return made


def members(params, rows):
    return np.array(MODEL.apply(params, *padded(rows, 128)), np.float64)


def test_every_member_is_on_the_scale_of_its_reference_samples(folders, params):
    raw = members(params[0], encode_scored(TOKENIZER, PROMPTS, RESPONSES, 64))
    scaled = (raw - SCALES["mean"]) / SCALES["std"]
    np.testing.assert_allclose(
        RewardModelReward(folders[0])(PROMPTS, RESPONSES), scaled.mean(axis=1), atol=1e-5
    )
    plain = RewardModelReward(folders[0], normalised=False)(PROMPTS, RESPONSES)
    np.testing.assert_allclose(plain, raw.mean(axis=1), atol=1e-5)


def test_an_ensemble_is_the_mean_of_all_members_less_their_deviation(folders, params):
    asked = [({"role": "user", "content": "Hello"},), None, None]
    turns = [asked[0], *(({"role": "user", "content": prompt},) for prompt in PROMPTS[1:])]
    rows = [
        encode_scored(TOKENIZER, PROMPTS, RESPONSES, 64),
        encode_scored(TOKENIZER, None, RESPONSES, 64, turns),
    ]
    raw = np.concatenate([members(tree, r) for tree, r in zip(params, rows, strict=True)], axis=1)
    scaled = (raw - SCALES["mean"] * 2) / (SCALES["std"] * 2)
    expected = [np.mean(row) - 1.5 * np.sqrt(np.mean((row - np.mean(row)) ** 2)) for row in scaled]
    reward = RewardModelReward((folders[0], folders[1]), uncertainty_penalty=1.5)
    np.testing.assert_allclose(reward(PROMPTS, RESPONSES, asked), expected, atol=1e-5)
    assert reward.diagnostics()["uncertainty"] == pytest.approx(scaled.std(axis=1).mean(), rel=1e-4)
    assert reward.diagnostics() == {}


def test_a_model_without_a_scale_is_read_raw_or_not_at_all(folders, params):
    with pytest.raises(UserError, match="expected a reward model with its normaliser, got one without"):
        RewardModelReward(folders[2])(PROMPTS, RESPONSES)
    found = RewardModelReward(folders[2], normalised=False, max_length=64)(PROMPTS, RESPONSES)
    raw = members(params[0], encode_scored(TOKENIZER, PROMPTS, RESPONSES, 64))
    np.testing.assert_allclose(found, raw.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ()}, "path must be a folder, or at least one, got none"),
        ({"path": "x", "uncertainty_penalty": -1.0}, "uncertainty_penalty must be at least 0"),
        ({"path": "x", "batch_size": 0}, "batch_size must be in \\[1, 1048576\\], got 0"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModelReward(**settings)


def test_doubt_needs_two_members(tmp_path):
    one = TextScorer(TRUNK, RegressionHead(labels=("only",)))
    save_scorer(tmp_path, one, jax.jit(one.init)(jax.random.key(0)), TOKENIZER.save)
    with pytest.raises(UserError, match="uncertainty_penalty needs two members or more"):
        RewardModelReward(str(tmp_path), uncertainty_penalty=1.0)(PROMPTS, RESPONSES)
