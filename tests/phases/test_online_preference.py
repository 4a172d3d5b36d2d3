"""Preferences online: who stands against whom, what has a gradient, and what the settings allow."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.core.batches import Example, PromptBatch, Rollout, Samples
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.phases.answer_losses import answer_log_probs
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.online_preference import OnlinePreference
from hybrid_jax.phases.online_preference_functions import OnlinePreferenceFunctions
from hybrid_jax.phases.played import Answered
from hybrid_jax.phases.references import Reference
from hybrid_jax.phases.rollout_settings import Opponent
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.rewards.part import Part
from hybrid_jax.rewards.postprocess import Running
from hybrid_jax.testing import PrefixTable, reference_params
from hybrid_jax.training.update import gradients

DEBUG = Path(__file__).parents[2] / "configs" / "debug"
LENGTH, PROMPT, ANSWER = 7, 3, 4
REWARD = {"parts": {"length": {"reward": {"name": "length", "target": 3}}}}


@dataclass(frozen=True)
class States:
    """A model whose hidden states are its parameters, row by row, and its logits those."""

    vocab_size: int = 5
    loss_coefs = {}  # noqa: RUF012

    def hidden_and_losses(self, params, tokens, attention_mask=None, *, dropout_key=None):
        return params["states"].reshape(*tokens.shape, self.vocab_size), {}

    def cast(self, params):
        return params

    def logits(self, params, hidden):
        return hidden


def functions(**changes) -> OnlinePreferenceFunctions:
    given = {"reward": REWARD, "sampler": {"max_new_tokens": ANSWER}, "prompts_per_step": 3, **changes}
    model: Any = States()
    return OnlinePreferenceFunctions(parse(OnlinePreference, given), model, (0,), "online", "online")


def rollout(scores, seed=0, **fields) -> Rollout:
    """Answers of random tokens and lengths behind prompts of other lengths, each with the end token 0."""
    rng = np.random.default_rng(seed)
    rows = len(scores)
    tokens = rng.integers(1, 5, (rows, LENGTH)).astype(np.int32)
    prompts, answers = rng.integers(1, PROMPT + 1, rows), rng.integers(1, ANSWER + 1, rows)
    action_mask = np.arange(ANSWER) < answers[:, None]
    tokens[np.arange(rows), PROMPT + answers - 1] = 0
    read = np.hstack([np.arange(PROMPT) >= PROMPT - prompts[:, None], action_mask])
    log_probs = rng.normal(-1, 0.3, (2, rows, ANSWER)).astype(np.float32)
    scores = jnp.asarray(scores, jnp.float32)
    made: dict[str, Any] = {
        "tokens": jnp.asarray(tokens),
        "attention_mask": jnp.asarray(read),
        "action_mask": jnp.asarray(action_mask),
        "log_probs": jnp.asarray(log_probs[0]),
        "group": jnp.arange(rows) // 2,
        "reference_log_probs": {"sft": jnp.asarray(log_probs[1])},
        "scores": scores,
        "plain_scores": scores,
    }
    return Rollout(**{**made, **fields})


def compared(made: OnlinePreferenceFunctions, own: Rollout, *rivals: Rollout) -> tuple[Any, dict[str, Any]]:
    return jax.jit(lambda own, rivals: made.compared(own, rivals))(own, rivals)


def slopes(made: OnlinePreferenceFunctions, states: Any, answers: Any) -> tuple[Any, dict[str, Any]]:
    """The gradient of the hidden states, and the metrics."""

    def compute(states):
        params = {"model": {"states": states}}
        return gradients(made.objective(PROMPT), params, (answers, None), jax.random.key(0))

    grads, metrics = jax.jit(compute)(states)
    return grads["model"]["states"], metrics


def reference_of(played: Rollout) -> np.ndarray:
    return np.where(played.action_mask, played.reference_log_probs["sft"], 0.0).sum(axis=1)


def test_the_best_of_a_group_stands_against_the_worst_and_equal_scores_have_no_weight():
    played = rollout([1, 3, 2, 5, 5, 5, -1, -2, -2])
    answers, metrics = compared(functions(samples_per_prompt=3), played)
    chosen = np.array([[1, 0], [3, 5], [6, 8]])
    np.testing.assert_array_equal(answers.rows.tokens, np.asarray(played.tokens)[chosen])
    np.testing.assert_array_equal(answers.rows.segment_ids > 0, np.asarray(played.attention_mask)[chosen])
    np.testing.assert_array_equal(answers.rows.loss_mask[..., PROMPT:], np.asarray(played.action_mask)[chosen])
    assert not np.asarray(answers.rows.loss_mask[..., :PROMPT]).any()
    np.testing.assert_allclose(answers.reference, reference_of(played)[chosen], rtol=1e-6)
    assert np.asarray(answers.counts).tolist() == [True, False, True]
    assert float(metrics["ties"]) == pytest.approx(1 / 3)


def test_each_answer_stands_against_those_of_its_opponent_by_score():
    settings = {
        "pairs": "opponent",
        "samples_per_prompt": 1,
        "opponent": {"reference": "sft", "num_samples": 2},
    }
    own = rollout([1, 2, 3])
    rivals = rollout([0, 2, 4], seed=1), rollout([2, 0, 3], seed=2)
    answers, metrics = compared(functions(**settings), own, *rivals)
    tokens = [[own, rivals[0]], [rivals[1], own], None, [own, rivals[1]], [rivals[0], own], None]
    for pair, sides in enumerate(tokens):
        if sides is not None:
            expected = [np.asarray(side.tokens)[pair // 2] for side in sides]
            np.testing.assert_array_equal(answers.rows.tokens[pair], expected)
    assert np.asarray(answers.counts).tolist() == [True, True, False, True, True, False]
    assert {name: float(number) for name, number in metrics.items()} == {
        "ties": pytest.approx(2 / 6),
        "win_rate": pytest.approx((1 + 0 + 0.5 + 1 + 0 + 0.5) / 6),
        "opponent_score": pytest.approx(11 / 6),
    }


def test_of_a_group_every_answer_is_learned_with_its_share_of_wins():
    settings = {"pairs": "group", "loss": "sppo", "samples_per_prompt": 3}
    played = rollout([1, 3, 2, 5, 5, 5, -1, -2, -2])
    answers, metrics = compared(functions(**settings), played)
    np.testing.assert_allclose(answers.wins, [[1, 0.5, 0], [0.5, 0.5, 0.5], [1, 0.25, 0.25]])
    np.testing.assert_array_equal(answers.rows.tokens[0], np.asarray(played.tokens)[[1, 2, 0]])
    assert answers.counts is None
    assert float(metrics["ties"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo", "orpo"])
def test_only_states_before_chosen_tokens_of_pairs_that_differ_have_a_gradient(loss):
    made = functions(loss=loss, sampler={"max_new_tokens": ANSWER, "temperature": 0.8})
    answers, _ = compared(made, rollout([1, 3, 5, 5, -1, -2]))
    states = jax.random.normal(jax.random.key(0), (3, 2, LENGTH, 5))
    slope = np.abs(slopes(made, states, answers)[0]).max(axis=-1) > 0
    learned = np.asarray(answers.rows.loss_mask) & np.asarray(answers.counts)[:, None, None]
    np.testing.assert_array_equal(slope, np.roll(learned, -1, axis=2))


def test_the_loss_is_the_mean_over_pairs_that_differ_at_the_temperature_that_sampled():
    made = functions(
        sampler={"max_new_tokens": ANSWER, "temperature": 0.8}, loss={"name": "sigmoid", "beta": 0.3}
    )
    answers, _ = compared(made, rollout([1, 3, 5, 5, -1, -2]))
    states = jax.random.normal(jax.random.key(0), (3, 2, LENGTH, 5))
    _, metrics = slopes(made, states, answers)
    logits = np.asarray(states, np.float64) / 0.8
    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = []
    for pair in (0, 2):
        gain = []
        for side in (0, 1):
            mask, tokens = np.asarray(answers.rows.loss_mask)[pair, side], answers.rows.tokens[pair, side]
            own = sum(table[pair, side, t - 1, int(tokens[t])] for t in np.flatnonzero(mask))
            gain.append(own - float(answers.reference[pair, side]))
        losses.append(np.log1p(np.exp(-0.3 * (gain[0] - gain[1]))))
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.fixture(scope="module")
def experiment():
    """A run of online DPO at another temperature, built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DEBUG.parents[1])
        overrides = [
            "run_dir=/nonexistent",
            "tokenizer=bytes",
            "phases.online_preference.sampler.temperature=0.7",
        ]
        return build(load_config(DEBUG / "online_dpo.yaml", overrides))


def test_the_loss_reads_the_log_probs_that_the_sampler_recorded(experiment):
    phase, state = experiment.phases["online_preference"], experiment.init()
    state = phase.rollouts.references.updated(state)
    played = phase.rollouts.play(state, jax.random.key(3), jax.random.key(4), Clock()).rollout
    lengths = np.asarray(played.attention_mask[:, :-16]).sum(axis=1)
    assert lengths.min() < lengths.max()  # prompts of other lengths, padded on the left
    answers = phase.functions._answers(played)
    read = jax.jit(answer_log_probs, static_argnums=0, static_argnames=("temperature", "prompt_length"))
    prompt_length = played.tokens.shape[1] - 16
    log_probs = read(
        experiment.model, state.policy, answers.rows, temperature=0.7, prompt_length=prompt_length
    )[0]
    recorded = np.where(played.action_mask, played.log_probs, 0.0).sum(axis=1)
    np.testing.assert_allclose(log_probs, recorded, atol=2e-4)
    np.testing.assert_allclose(answers.reference, recorded, atol=2e-4)
    hot = read(experiment.model, state.policy, answers.rows, prompt_length=prompt_length)[0]
    assert np.abs(np.asarray(hot) - recorded).max() > 0.1


def test_parts_padding_and_devices_change_no_gradient():
    made = replace(functions(prompts_per_step=8), model=PrefixTable())
    played = rollout(np.random.default_rng(0).normal(size=16).round())  # with ties
    answers, _ = compared(made, replace(played, tokens=played.tokens % 3))
    assert 0 < int(answers.counts.sum()) < 8
    longer = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (5, 2))), answers.rows)

    def compute(batch, prompt, parts):
        params: Any = {"model": reference_params()}
        return gradients(made.objective(prompt), params, (batch, None), jax.random.key(0), parts)

    jitted = jax.jit(compute, static_argnums=(1, 2))
    whole = jitted(answers, PROMPT, 1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    spread = jax.device_put(answers, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    others = [(answers, PROMPT, 4), (answers.replace(rows=longer), PROMPT + 5, 1), (spread, PROMPT, 1)]
    assert np.abs(whole[0]["model"]["table"]).max() > 1e-3
    for other in others:
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(jitted(*other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss=kto", "loss must learn from pairs with pairs: best_worst, got kto, which learns from answers"),
        ("loss=sppo", "loss must learn from pairs with pairs: best_worst, got sppo, which learns from groups"),
        ("pairs=group", "loss must learn from groups with pairs: group, got sigmoid, which learns from pairs"),
        ("pairs=opponent", "opponent must name a reference for pairs: opponent, got none"),
        ("samples_per_prompt=1", "samples_per_prompt must be at least 2 for pairs: best_worst, got 1"),
        ("references={}", "references must have a weight above 0 together for the loss sigmoid, got none"),
        ("minibatches=3", "minibatches × microbatches must divide the 4 pairs or groups of a step, got 3 × 2"),
    ],
)
def test_settings_that_cannot_be_are_one_line(override, line):
    with pytest.raises(UserError, match=line):
        load_config(DEBUG / "online_dpo.yaml", [f"phases.online_preference.{override}"])


def test_a_reward_is_needed_unless_the_data_answers():
    with pytest.raises(UserError, match="reward must be given for pairs: best_worst, got none"):
        parse(OnlinePreference, {})
    with pytest.raises(UserError, match="refill_rounds must be null for pairs: example, got 2"):
        parse(OnlinePreference, {"pairs": "example", "refill_rounds": 2})
    assert parse(OnlinePreference, {"pairs": "example"}).num_groups == 128


def test_a_loss_of_groups_has_no_place_in_preferences_of_a_file():
    with pytest.raises(UserError, match="take sppo_hard, or the phase online_preference"):
        load_config(DEBUG / "dpo.yaml", ["phases.preference.loss=sppo"])


def test_a_reference_is_copied_again_after_so_many_steps():
    reference = Reference(refresh_every_steps=2)
    assert [reference.is_due(0, False, steps) for steps in range(5)] == [False, False, True, False, True]
    with pytest.raises(ValueError, match="refresh_every_steps must be null for a reference with a path"):
        Reference(path="folder", refresh_every_steps=2)


def played_by(experiment, reward: CompositeReward, rows: list[str], rivals: list[str]) -> Any:
    """The rollout of those answers, and of those of an opponent, once they are rewarded."""
    rollouts = copy.copy(experiment.phases["online_preference"].rollouts)
    settings: dict[str, Any] = {"pairs": "opponent", "opponent": Opponent("sft"), "samples_per_prompt": 1}
    settings |= {"minibatches": 1, "microbatches": 1, "prompts_per_step": len(rows)}
    rollouts.config = replace(rollouts.config, reward=reward, **settings)

    def samples(texts):
        mask = np.arange(4) < np.array([[len(text)] for text in texts])
        tokens = np.array([list(text.encode().ljust(4)) for text in texts], np.int32)
        return Samples.chosen(*put_rows(experiment.placement, (tokens, np.zeros(tokens.shape), mask)))

    ones = np.ones((len(rows), 2), np.int32)
    asked = PromptBatch(ones, ones > 0, (Example("a"),) * len(rows))
    own, others = samples(rows), samples(rivals)
    empty: list[Any] = [None] * 5
    rollout = Rollout(*empty)
    texts = rollouts._read(asked, own, (others,), Clock())
    answered = Answered(asked, own, rollout, [rollout], texts, following=None, cursor=0)
    state: Any = SimpleNamespace(host={})
    return rollouts._rewarded(state, answered, reward.init(), Clock())[0]


def test_policy_and_opponent_are_scored_on_one_scale(experiment):
    reward = CompositeReward(
        {"length": Part(lambda responses: [len(text) for text in responses], normalise=Running())}
    )
    own, rival = played_by(experiment, reward, ["a", "aaa"], ["aa", "aaaa"])
    # 1, 3 and 2, 4 have mean 2.5 together; each by itself would be −1 and 1. Nobody ended: each pays 1.
    scale = np.std([1, 2, 3, 4])
    np.testing.assert_allclose(own.scores, np.array([-1.5, 0.5]) / scale - 1, rtol=1e-4)
    np.testing.assert_allclose(rival.scores, np.array([-0.5, 1.5]) / scale - 1, rtol=1e-4)
    assert np.asarray(rival.plain_scores).tolist() == [2, 4]


def test_a_reward_that_compares_reads_each_answer_beside_the_other(experiment):
    def beside(responses, opponents):
        return [10 * len(text) + len(others[0]) for text, others in zip(responses, opponents, strict=True)]

    reward = CompositeReward({"beside": Part(beside)})
    own, rival = played_by(experiment, reward, ["a", "aaa"], ["aa", "aaaa"])
    assert np.asarray(own.plain_scores).tolist() == [12, 34]
    assert np.asarray(rival.plain_scores).tolist() == [21, 43]


def spin(folder, rows, *fields) -> Any:
    """A run of SPIN on those rows, built."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"{{name: jsonl, train: {folder}/rows.jsonl, held_out: {folder}/rows.jsonl}}"
    overrides = [f"data={data}", *fields, "tokenizer=bytes", f"run_dir={folder}/run"]
    overrides += ["scheduler.warmup={}", "phases.ppo=null", "phases.sft=null"]
    return build(
        load_config(DEBUG / "spin.yaml", [*overrides, "phases.online_preference.samples_per_prompt=2"])
    )


def test_the_answers_of_the_data_stand_behind_their_prompts_cut_as_the_policys_are(tmp_path):
    texts = {"a": "short", "bb": "as long as 16 to", "ccc": "longer than what may be sampled"}
    experiment = spin(tmp_path, [{"prompt": p, "completion": a} for p, a in texts.items()])
    rollouts = experiment.phases["online_preference"].rollouts
    prompts, answers = rollouts.prompts.batch(5, 3), rollouts._data_answers.batch(5, 3)
    for row in range(6):
        prompt = prompts.examples[row // 2].prompt
        expected = [*texts[prompt].encode(), rollouts._tokenizer.eos_id][:16]
        count = len(expected)
        assert answers.tokens[row, :count].tolist() == expected
        for mask in (answers.action_mask, answers.attention_mask):
            assert mask[row].tolist() == [True] * count + [False] * (16 - count)


def test_a_row_without_an_answer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"phases.online_preference: .*rows.jsonl:1: no answer to learn from"):
        spin(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], "data.response_field=null")
