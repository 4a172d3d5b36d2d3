"""The phase that trains reward models: its gradient, its report, its scale, and that it resumes to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_jax.phases.reward_model  # noqa: F401
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.preference_stream import PreferenceStream, Reading, bootstrap_weights
from hybrid_jax.data.preferences import JsonlPreferences, Preference
from hybrid_jax.data.scored_text import encode_scored
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.encoder import EncoderConfig
from hybrid_jax.models.folders.hf import save_pretrained
from hybrid_jax.models.heads import RegressionHead
from hybrid_jax.models.ngrams import NGrams
from hybrid_jax.models.scorer import TextScorer
from hybrid_jax.models.text_encoder import TextEncoder
from hybrid_jax.phases.reference_samples import ReferenceSamples
from hybrid_jax.phases.reward_model import RewardModel, reward_objective
from hybrid_jax.phases.reward_report import agreement
from hybrid_jax.rewards.reward_model import RewardModelReward
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training.loop import take_step, train
from hybrid_jax.training.update import gradients

CONFIGS = Path(__file__).parents[2] / "configs"
DEBUG = CONFIGS / "debug" / "reward_model.yaml"
DATA = JsonlPreferences(train=CONFIGS / "debug" / "reward_model.jsonl", margin_field="confidence")
TOKENIZER = Bytes().build([])


def experiment(folder, *overrides):
    return build(load_config(DEBUG, [f"run_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = experiment(tmp_path_factory.mktemp("whole") / "run", "steps=20")
    return run, train(run)


def groups(params):
    """The groups of a run, of the parameters of a scorer."""
    return {"model": params["trunk"], "heads/reward": params["head"]}


@pytest.fixture(scope="module")
def stream():
    return PreferenceStream(DATA.load("train"), TOKENIZER, Reading(max_length=96), seed=3, members=2)


def test_a_batch_holds_every_response_with_its_rank_and_repeats_the_first_for_those_that_are_not_there(stream):
    rows = DATA.load("train")
    batch = stream.batch(25, 10)  # over the end of an epoch
    assert batch.tokens.shape[:2] == (10, 3)
    for i, row in enumerate(batch.index):
        responses, ranks = rows[row].ranking
        texts = [responses[k] if k < len(responses) else responses[0] for k in range(3)]
        for k, expected in enumerate(encode_scored(TOKENIZER, [rows[row].prompt] * 3, texts, 96)):
            np.testing.assert_array_equal(batch.tokens[i, k][batch.mask[i, k]], expected)
        assert batch.labels.ranks[i, : len(ranks)].tolist() == list(ranks)
        assert batch.labels.present[i].tolist() == [k < len(responses) for k in range(3)]
        assert batch.labels.margins[i] == (rows[row].margin or 0.0)


def test_every_member_learns_a_bootstrap_sample_of_its_own_and_one_alone_learns_all():
    weights = bootstrap_weights(20000, 2, seed=0)
    assert np.bincount(weights[:, 0].astype(int))[:3] / 20000 == pytest.approx(
        [np.exp(-1), np.exp(-1), np.exp(-1) / 2], abs=0.01
    )
    assert abs(np.corrcoef(weights.T)[0, 1]) < 0.03
    assert (bootstrap_weights(5, 1, seed=0) == 1).all()


def test_the_gradient_is_that_of_the_loss_over_prompts_whatever_the_microbatches(stream):
    trunk = NGrams(bucket_bits=6, width=4).build(TOKENIZER.vocab_size)
    model = TextScorer(trunk, RegressionHead(labels=("a", "b")))
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    config = RewardModel(batch_size=8, label_smoothing=0.1, margin_coef=0.5, centring_coef=0.3)
    batch = jax.tree.map(jnp.asarray, stream.batch(0, 8))
    objective = reward_objective(config, "reward", model)

    labels = jax.tree.map(np.asarray, batch.labels)

    def by_hand(params):
        total = 0.0
        for b in range(8):
            rewards = model.apply(params, batch.tokens[b], batch.mask[b])
            losses = []
            here = [k for k in range(3) if labels.present[b, k]]
            for i in here:
                for j in here:
                    d = rewards[i] - rewards[j]
                    centre = 0.3 * (rewards[i] + rewards[j]) ** 2
                    if labels.ranks[b, i] < labels.ranks[b, j]:
                        d = d - 0.5 * labels.margins[b]
                        loss = -0.9 * jax.nn.log_sigmoid(d) - 0.1 * jax.nn.log_sigmoid(-d)
                        losses.append(loss + centre)
                    elif i < j and labels.ranks[b, i] == labels.ranks[b, j]:
                        losses.append(-0.5 * jax.nn.log_sigmoid(d) - 0.5 * jax.nn.log_sigmoid(-d) + centre)
            total += (labels.weights[b] * sum(losses) / len(losses)).sum()
        return total / labels.weights.sum()

    expected = jax.jit(jax.grad(by_hand))(params)
    for parts in (1, 4):
        found = jax.jit(lambda p, parts=parts: gradients(objective, groups(p), batch, jax.random.key(0), parts))
        grads, metrics = found(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, groups(expected))
    assert set(metrics) == {"loss", "centring", "accuracy", "margin"}


def test_it_learns_preferences_that_have_nothing_to_do_with_length(trained):
    run, state = trained
    report = run.phases["reward_model"].evaluate(state)
    assert report["accuracy"] == 1.0
    assert report["loss"] < 0.5 < 0.69
    assert report["disagreement"] > 0


def test_its_report_is_what_its_exported_scorer_says(trained):
    run, state = trained
    held_out = [Preference.of(example) for example in run.config.data.load("held_out")]
    reward = RewardModelReward(str(run.config.run_dir / "model"), normalised=False)
    scores = [reward([row.prompt] * len(row.ranking[0]), row.ranking[0]) for row in held_out]
    pairs = [
        (r[i] - r[j], len(row.ranking[0][i]), len(row.ranking[0][j]))
        for row, r in zip(held_out, scores, strict=True)
        for i in range(len(r))
        for j in range(len(r))
        if row.ranking[1][i] < row.ranking[1][j]
    ]
    report = run.phases["reward_model"].evaluate(state)
    assert report["pairs"] == len(pairs)
    assert report["margin"] == pytest.approx(np.mean([d for d, _, _ in pairs]), rel=1e-4)
    assert report["longer_wins"] == np.mean([(np.sign(a - b) + 1) / 2 for _, a, b in pairs])
    matched = [d > 0 for d, a, b in pairs if abs(np.log(a / b)) <= 0.2]
    assert report["length_matched_pairs"] == len(matched)
    assert report["length_matched_accuracy"] == np.mean(matched)


def test_the_exported_rewards_of_the_training_responses_have_mean_0_and_deviation_1(trained):
    run, _ = trained
    rows = [Preference.of(example) for example in run.config.data.load("train")]
    asked = [(row.prompt, response) for row in rows for response in row.ranking[0]]
    folder = run.config.run_dir / "model"
    reward = RewardModelReward(str(folder))
    prompts, responses = zip(*asked, strict=True)
    scores = np.array(reward(prompts, responses))
    assert scores.mean() == pytest.approx(0.0, abs=1e-5)
    assert reward.diagnostics()["uncertainty"] > 0
    extra = json.loads((folder / "extra.json").read_text())
    assert extra["normaliser"]["samples"] == len(asked)
    assert extra["reading"] == {"prompt": True, "chat": False, "max_length": 128, "cut": "truncate_end"}

    raw = np.array(RewardModelReward(str(folder), normalised=False)(prompts, responses))
    assert np.corrcoef(raw, scores)[0, 1] > 0.999
    doubtful = RewardModelReward((str(folder), str(folder)), uncertainty_penalty=2.0)
    members = np.array(doubtful(prompts, responses))
    spread = (scores - members) / 2
    assert (spread >= -1e-6).all()
    assert spread.mean() == pytest.approx(doubtful.diagnostics()["uncertainty"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_to_the_same_bits(tmp_path):
    constant = "phases.reward_model.optimizer.schedule=constant"  # a schedule to the end depends on the end
    straight = train(experiment(tmp_path / "straight", "steps=5", constant))
    train(experiment(tmp_path / "parts", "steps=2", constant))
    resumed = train(experiment(tmp_path / "parts", "steps=5", constant))
    assert resumed.cursors == straight.cursors == {"reward_model": 40}
    jax.tree.map(np.testing.assert_array_equal, resumed.train.params, straight.train.params)


def test_features_of_a_frozen_body_are_as_good_as_its_tokens(stream):
    encoder = EncoderConfig(vocab_size=TOKENIZER.vocab_size, num_layers=1, width=8, num_heads=2, mlp_width=16)
    model = TextScorer(TextEncoder(encoder), RegressionHead(labels=("a",), trains_trunk=False))
    params = jax.jit(lambda key: jax.tree.map(lambda x: x + 0.05, model.init(key)))(jax.random.key(1))
    batch = jax.tree.map(jnp.asarray, stream.batch(0, 4))
    flat = [x.reshape(12, -1) for x in (batch.tokens, batch.mask)]
    features = jax.jit(model.features)(params, *flat).reshape(4, 3, -1)
    objective = reward_objective(RewardModel(batch_size=4), "reward", model)
    loss = jax.jit(lambda batch: objective.loss(groups(params), batch, jax.random.key(0))[0]["loss"].total)
    kept = batch.replace(tokens=None, mask=None, features=features)
    assert float(loss(kept)) == pytest.approx(float(loss(batch)), rel=1e-5)


def test_a_conversation_is_read_by_the_chat_template_and_a_plain_prompt_as_its_one_message():
    tokenizer = Bytes(chat_template="chatml").build([])
    asked = ({"role": "user", "content": "hi"},)
    reading = Reading(chat=True, max_length=64)
    rows = reading.rows(tokenizer, ["hi", "hi"], ["yes", "yes"], [asked, None])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], encode_scored(tokenizer, None, ["yes"], 64, [asked])[0])
    alone = Reading(prompt=False).rows(tokenizer, ["hi"], ["yes"], [asked])
    np.testing.assert_array_equal(alone[0], encode_scored(tokenizer, None, ["yes"], None)[0])
    assert Reading.of(reading.settings) == reading


@pytest.mark.slow  # transformers reads the folder
def test_the_scale_can_be_that_of_a_policys_samples(tmp_path, trained):
    folder = tmp_path / "policy"
    settings = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=64)
    model = settings.build(TOKENIZER.vocab_size)
    save_pretrained(folder, model, jax.jit(model.init)(jax.random.key(0)), eos_ids=(TOKENIZER.eos_id,))
    TOKENIZER.save(folder)
    rows = [Preference(f"question {i}", "a", "b") for i in range(5)] + [Preference("question 1", "c", "d")]
    reference = ReferenceSamples(folder, num_prompts=4, batch_size=3, sampler=Ancestral(max_new_tokens=6))
    drawn = reference.draw(rows, seed=0)
    assert [prompt for prompt, _, _ in drawn] == [f"question {i}" for i in range(4)]
    assert drawn == reference.draw(rows, seed=0)
    assert drawn != reference.draw(rows, seed=1)

    run, state = trained
    phase = run.phases["reward_model"]
    phase.config = replace(phase.config, reference=reference)
    extra = phase.extra(state)["normaliser"]
    assert (extra["samples"], extra["of"]) == (4, str(folder))


def test_the_report_leaves_out_ties_and_survives_texts_of_no_length():
    rows = [Preference("q", "", "a"), Preference("q", "b", "c", tie=True)]
    report = agreement(rows, [np.array([1.0, 0.0]), np.array([0.0, 5.0])], 0.2)
    assert (report["pairs"], report["accuracy"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["label_smoothing=0.5"], r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (["tie_threshold=0"], "tie_threshold must be above 0, got 0"),
        (["loss=plackett_luce"], "loss must be pairs for margins, label_smoothing or tie_threshold"),
        (["microbatches=3"], "microbatches must divide batch_size 8, got 3"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config(DEBUG, [f"phases.reward_model.{override}" for override in overrides])


def test_data_that_the_loss_cannot_learn_is_one_line(tmp_path):
    plackett = ["loss=plackett_luce", "margin_coef=0", "label_smoothing=0"]
    with pytest.raises(UserError, match="loss must be pairs for data with ties, got plackett_luce"):
        experiment(tmp_path / "run", *[f"phases.reward_model.{override}" for override in plackett])
    with pytest.raises(UserError, match=r"phases\.reward_model: expected rows with a chosen and a rejected"):
        experiment(tmp_path / "run", "data={name: restaurants}")


def test_a_step_is_compiled_once(tmp_path):
    run = experiment(tmp_path / "run")
    state, phase = run.init(), run.phases["reward_model"]
    for _ in range(4):
        state = take_step(run, phase, state)
    assert phase._update._cache_size() == 1
