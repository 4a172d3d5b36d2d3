"""What PPO makes of a reward: placed on tokens, normalised, against opponents, beside several references."""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.advantages import gae
from hybrid_jax.algorithms.kl import FixedKL
from hybrid_jax.core.batches import Example, PromptBatch, Rollout, Samples
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.classifier import Classifier, save_classifier
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.parallel.mesh import put_rows
from hybrid_jax.phases.clock import Clock
from hybrid_jax.phases.played import Answered
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.references import Reference
from hybrid_jax.phases.rollout_settings import Opponent
from hybrid_jax.phases.value_network import read_value
from hybrid_jax.rewards.combine import Baseline
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.postprocess import Group
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import SEQUENCES, PrefixTable, reference_params, sequence_probabilities
from hybrid_jax.training.optimizers import Adam, Constant, Linear
from hybrid_jax.training.state import TrainState

ROWS = 8
THOROUGHLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # a long run
COUNT = CompositeReward({"count": Part(TokenCount(weights={2: 1.0}))})


class Compiled(PolicyGradientFunctions):
    """Every function one program, where operation by operation would compile hundreds."""

    __eq__, __hash__ = object.__eq__, object.__hash__
    sample = jax.jit(PolicyGradientFunctions.sample, static_argnums=0)
    score = jax.jit(PolicyGradientFunctions.score, static_argnums=0)
    learn = jax.jit(PolicyGradientFunctions.learn, static_argnums=0, static_argnames="groups")
    advantages = jax.jit(PolicyGradientFunctions.advantages, static_argnums=0)


def functions(model=None, **settings) -> PolicyGradientFunctions:
    config = PPO(
        **{
            "reward": COUNT,
            "prompts_per_step": ROWS,
            "sampler": Ancestral(max_new_tokens=3),
            "epochs": 2,
            "missing_eos_penalty": None,
            "optimizer": Adam(learning_rate=1e-2, schedule=Constant()),
            **settings,
        }
    )
    return Compiled(config, model or PrefixTable(), eos_ids=(), name="ppo", optimizer_key="ppo")


def rewarded(scored, scores, placed=None):
    return scored.replace(scores=scores, plain_scores=scores, placed=placed)


def state_of(ppo, policy) -> TrainState:
    params = {"model": policy, **ppo.init_value(policy)}
    transform = ppo.config.optimizer.transform()
    return TrainState(
        params=params,
        opt_state={"ppo": {group: transform.init(tree) for group, tree in params.items()}},
        extra={ppo.kl_key: ppo.config.kl_control.init()},
    )


@pytest.fixture(scope="module")
def rolled_out():
    ppo = functions(trace=1.0, whiten_advantages=False)
    state = state_of(ppo, reference_params())
    tokens, mask = jnp.zeros((ROWS, 1), jnp.int32), jnp.ones((ROWS, 1), bool)
    samples = ppo.sample(state.params["model"], tokens, mask, jax.random.key(0))
    references = {"sft": {"table": state.params["model"]["table"] * 0.5}}
    return ppo, state, ppo.score(state.params, references, tokens, mask, samples)


def test_placed_rewards_and_the_rest_add_up_to_the_score(rolled_out):
    ppo, _, scored = rolled_out
    placed = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 3)), jnp.float32)
    scores, coef = jnp.arange(8.0), jnp.asarray(0.3)
    at_the_end, _ = ppo.advantages(rewarded(scored, scores), coef)
    early, _ = ppo.advantages(rewarded(scored, scores, placed=placed), coef)
    # λ = γ = 1: the first return is the sum of all rewards; later ones lack what came before
    assert np.asarray(early.returns[:, 0]) == pytest.approx(np.asarray(at_the_end.returns[:, 0]), abs=1e-5)
    kl = 0.3 * np.asarray(scored.log_probs - scored.reference_log_probs["sft"])
    assert np.asarray(early.returns[:, 0]) == pytest.approx(np.asarray(scores) - kl.sum(axis=1), abs=1e-5)
    earlier = np.asarray(at_the_end.returns - early.returns)[:, 1:]
    assert earlier == pytest.approx(np.cumsum(np.asarray(placed), axis=1)[:, :-1], abs=1e-5)


def test_a_reward_placed_a_token_later_changes_the_advantages_up_to_there_alone(rolled_out):
    ppo, _, scored = rolled_out
    ppo = functions(trace=0.9, discount=0.8, whiten_advantages=False)
    one, later = np.zeros((2, ROWS, 3), np.float32)
    one[:, 0], later[:, 1] = 1.0, 1.0
    scores = jnp.ones(ROWS)
    first, second = (
        np.asarray(
            ppo.advantages(rewarded(scored, scores, placed=jnp.asarray(placed)), jnp.asarray(0.0))[0].advantages
        )
        for placed in (one, later)
    )
    assert np.abs(first - second)[:, :2].min() > 0.01
    assert first[:, 2].tolist() == second[:, 2].tolist()


def test_dense_and_sparse_placement_have_the_same_exact_policy_gradient():
    """Σ_s π(s) Σ_t A_t ∇log π(s_t), with A from exact values, over all 27 responses."""
    policy = reference_params()
    log_probs = np.log(sequence_probabilities(policy))
    probabilities = np.exp(log_probs)
    rng = np.random.default_rng(0)
    per_token = {tuple(s[: t + 1]): rng.normal() for s in SEQUENCES for t in range(3)}
    dense = np.array([[per_token[tuple(s[: t + 1])] for t in range(3)] for s in SEQUENCES])
    sparse = np.zeros_like(dense)
    sparse[:, 2] = dense.sum(axis=1)

    def gradient(rewards):
        to_go = rewards[:, ::-1].cumsum(axis=1)[:, ::-1]
        values = np.zeros_like(rewards)
        for t in range(3):  # V before token t: the expected reward to go, given what came before
            for row, s in enumerate(SEQUENCES):
                same = (SEQUENCES[:, :t] == s[:t]).all(axis=1)
                values[row, t] = (probabilities[same] * to_go[same, t]).sum() / probabilities[same].sum()
        return np.asarray(surrogate_gradient(policy, rewards, values)["table"])

    @jax.jit
    @jax.grad
    def surrogate_gradient(params, rewards, values):
        mask = jnp.ones((27, 3), bool)
        advantages, _ = gae(rewards, values, mask, discount=1.0, trace=1.0)
        tokens = jnp.concatenate([jnp.zeros((27, 1), jnp.int32), jnp.asarray(SEQUENCES)], axis=1)
        logits = PrefixTable().apply(params, tokens).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(SEQUENCES)[..., None], axis=2)
        return (jnp.asarray(probabilities)[:, None] * advantages * chosen[..., 0]).sum()

    assert gradient(dense) == pytest.approx(gradient(sparse), abs=1e-6)
    assert np.abs(gradient(dense)).max() > 0.01


def test_an_affine_change_of_a_normalised_part_leaves_the_update_as_it_was(rolled_out):
    ppo, state, scored = rolled_out

    def updated(scale, shift):
        reward = CompositeReward({"raw": Part(lambda prompts, responses: [0.0] * ROWS, normalise=True)})
        raw = {"raw": (scale * np.arange(8.0) ** 2 + shift).astype(np.float32)}
        scores, _ = reward.weigh(reward.init(), raw, [""] * ROWS)
        received = rewarded(scored, jnp.asarray(scores.totals))
        return ppo.learn(state, received, None, jax.random.key(1), 1e-2)[0].params

    plain, moved = updated(1.0, 0.0), updated(1e3, -77.0)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(plain["model"]["table"] - state.params["model"]["table"]).max() > 1e-3


def test_a_baseline_is_taken_from_the_scores_but_not_from_what_is_logged(rolled_out):
    ppo, state, scored = rolled_out
    reward = CompositeReward({"given": Part(zeros)}, baseline=Baseline("ema", decay=0.0))
    scores, _ = reward.weigh(reward.init(), {"given": np.arange(8.0)}, [""] * ROWS)
    assert scores.baseline.tolist() == [3.5] * 8
    received = scored.replace(scores=jnp.asarray(scores.totals), plain_scores=jnp.asarray(scores.plain))
    _, metrics = ppo.learn(state, received, None, jax.random.key(1), 1e-2)
    assert (metrics["score"], metrics["shaped_score"]) == (3.5, 0.0)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_two_references_have_the_published_geometric_optimum():
    """π ∝ Π π_i^a_i exp(r/β); an arithmetic mixture would be 0.0027 away, so the tolerance tells them apart."""
    policies = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    geometric = np.array([0.018101, 0.134631, 0.845861, 0.001407])
    arithmetic = np.array([0.020822, 0.134001, 0.843451, 0.001727])
    model = OneToken()
    reward = TokenCount(weights={1: 1.0, 2: 2.0, 3: -1.0})
    ppo = functions(
        model,
        reward=CompositeReward({"count": Part(reward)}),
        prompts_per_step=2048,
        sampler=Ancestral(max_new_tokens=1),
        kl_control=FixedKL(0.5),
        references={"one": Reference(weight=0.7), "two": Reference(weight=0.3)},
        value_clip_range=None,
        value_coef=0.5,
        whiten_advantages=False,
        optimizer=Adam(learning_rate=0.1, schedule=Linear(), max_grad_norm=None),
    )
    references = {
        name: {"table": jnp.log(jnp.asarray(p, jnp.float32))[None]}
        for name, p in zip(("one", "two"), policies, strict=True)
    }
    tokens, mask = jnp.zeros((2048, 1), jnp.int32), jnp.ones((2048, 1), bool)
    steps = 800

    @functools.partial(jax.jit, compiler_options=THOROUGHLY)
    def run(key):
        def iteration(state, step):
            rate = ppo.config.optimizer.rate(step, steps)
            return ppo.iteration(state, references, tokens, mask, jax.random.fold_in(key, step), rate)

        return jax.lax.scan(iteration, state_of(ppo, references["one"]), jnp.arange(steps))

    state, _ = run(jax.random.key(0))
    found = np.asarray(jax.nn.softmax(state.params["model"]["table"][0]))
    assert found == pytest.approx(geometric, abs=1e-4)
    assert np.abs(found - arithmetic).max() > 2.5e-3


class OneToken(PrefixTable):
    """A bandit with four arms: one response token, the same whatever the prompt."""

    def __init__(self):
        object.__setattr__(self, "vocab_size", 4)
        object.__setattr__(self, "width", 1)
        object.__setattr__(self, "max_length", 2)

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None):
        return jnp.ones((*tokens.shape, 1))


DECODER = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=32).build(11)


def test_a_value_network_starts_as_the_normalised_reward_model(tmp_path):
    policy = DECODER.init(jax.random.key(0))
    classifier = Classifier(DECODER.config, labels=("reward",), has_bias=True)
    params = classifier.init(jax.random.key(5))
    params["score"]["bias"] = jnp.array([0.25])
    save_classifier(tmp_path, classifier, params, pad_id=3)
    (tmp_path / "extra.json").write_text(json.dumps({"normaliser": {"mean": 0.5, "std": 2.0}}))
    value = read_value(str(tmp_path), DECODER, policy, {})
    ppo = functions(DECODER, value_network="separate")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 9)))
    mask = jnp.ones((4, 9), bool)
    read = jax.jit(classifier.apply)
    rewards = (np.asarray(read(params, tokens[:, :-1], mask[:, :-1]))[:, 0] - 0.5) / 2.0
    samples = Samples.chosen(tokens[:, 4:], jnp.zeros((4, 5)), mask[:, 4:])
    scored = ppo.score(
        {"model": policy, "ppo/value": value}, {"sft": policy}, tokens[:, :4], mask[:, :4], samples
    )
    assert np.asarray(scored.values[:, -1]) == pytest.approx(rewards, abs=1e-5)  # of the state before the last
    assert jax.tree.structure(value["model"]) == jax.tree.structure(policy)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="value_init needs value_network: separate, got 'shared'"):
        PPO(reward=COUNT, value_init="somewhere")
    with pytest.raises(ValueError, match=r"opponent.reference must be one of sft, got 'old'"):
        PPO(reward=COUNT, opponent=Opponent("old"))
    with pytest.raises(ValueError, match="num_samples must be in \\[1, 1048576\\], got 0"):
        Opponent("sft", num_samples=0)
    with pytest.raises(ValueError, match="it never changes"):
        Reference(path="folder", refresh_every_cycles=2)


def test_raw_reward_shaped_reward_and_penalty_are_logged_under_names_of_their_own(rolled_out):
    """Of eight responses the first ends (token 2 is EOS here), the others are taken 0.5 for not ending."""
    ppo, state, scored = rolled_out
    ppo = replace(ppo, config=replace(ppo.config, missing_eos_penalty=0.5), eos_ids=(2,))
    tokens = scored.tokens.at[:, -3:].set(0).at[0, -3:].set(2)
    scored = replace(scored, tokens=tokens, action_mask=jnp.ones((ROWS, 3), bool).at[0, 1:].set(False))
    plain, penalties = jnp.arange(8.0), 0.5 * (jnp.arange(8) > 0)
    np.testing.assert_array_equal(ppo.penalties(ppo.complete(scored)), penalties)
    key = jax.random.key(0)
    received = scored.replace(plain_scores=plain, scores=plain - 3.5 - penalties)
    _, metrics = ppo.learn(state, received, None, key, 1e-2)
    assert (metrics["score"], metrics["score_std"]) == (3.5, pytest.approx(np.std(np.arange(8.0))))
    assert (metrics["penalty"], metrics["shaped_score"]) == (7 / 16, -7 / 16)
    received = scored.replace(plain_scores=plain, scores=plain - penalties)
    _, metrics = ppo.learn(state, received, None, key, 1e-2)  # no normaliser, as on the device
    assert (metrics["score"], metrics["penalty"], metrics["shaped_score"]) == (3.5, 7 / 16, 3.5 - 7 / 16)


def test_the_responses_to_one_prompt_are_known_by_their_row_and_not_by_its_text(tmp_path):
    """Two chats that end "Go on.", two answers each: by text all four would be one group."""
    config = Path(__file__).parents[2] / "configs" / "debug" / "hybrid.yaml"
    settings = ["prompts_per_step=2", "samples_per_prompt=2", "reward.baseline={kind: others}"]
    overrides = [f"phases.ppo.{setting}" for setting in settings]
    built = build(load_config(config, [f"run_dir={tmp_path}", "compilation_cache=null", *overrides]))
    phase = built.phases["ppo"]
    given = CompositeReward({"given": Part(lambda responses: [10, 10, 0, 0])}, baseline=Baseline("others"))
    phase.rollouts.config = replace(phase.config, reward=given)
    mask = np.ones((4, 3), bool)
    asked = PromptBatch(np.ones((4, 2), np.int32), mask[:, :2], (Example("Go on."),) * 4)
    samples = Samples.chosen(*put_rows(built.placement, (np.ones((4, 3), np.int32), np.zeros((4, 3)), mask)))
    state: Any = SimpleNamespace(host={"ppo/reward": given.init()})
    rollout = Rollout(asked.tokens, mask, mask, np.zeros((4, 3)), np.arange(4) // 2)
    texts = phase.rollouts._read(asked, samples, (), Clock())
    answered = Answered(asked, samples, rollout, (), texts, following=None, cursor=0)
    (received,), _, metrics = phase.rollouts._rewarded(state, answered, given.init(), Clock())
    # None has ended: each pays 1, and so does the other one, with which it is compared.
    assert received.scores.tolist() == [0, 0, 0, 0]
    assert (metrics["reward/given"], metrics["baseline"]) == (5.0, 4.0)


def zeros(responses):
    return [0.0] * len(responses)


@pytest.mark.parametrize(
    ("reward", "setting"),
    [
        (CompositeReward({"a": Part(zeros, normalise=Group())}), "parts.a.normalise: group"),
        (CompositeReward({"a": Part(zeros)}, baseline=Baseline("others")), "baseline: {kind: others}"),
    ],
)
def test_what_compares_the_answers_to_one_prompt_needs_two_of_them(reward, setting):
    with pytest.raises(ValueError, match=re.escape(f"at least 2 for reward.{setting}, got 1")):
        PPO(reward=reward)
    PPO(reward=reward, samples_per_prompt=2)


NORMALISER = "phases.ppo.reward.parts={a: {reward: {name: length, target: 3}, normalise: group}}"


@pytest.mark.parametrize(
    "comparison",
    [
        pytest.param("phases.ppo.reward.baseline={kind: others}", id="a baseline"),
        pytest.param(NORMALISER, id="a normaliser", marks=pytest.mark.slow),
    ],
)
def test_where_answers_are_compared_the_loss_at_ratio_one_is_about_zero_although_most_pay_a_penalty(
    tmp_path, comparison
):
    """It was 0.97, the share that did not end, when the penalty was taken behind the comparison."""
    settings = ["samples_per_prompt=4", "epochs=1", "minibatches=1", "whiten_advantages=false", "trace=1"]
    overrides = [f"phases.ppo.{setting}" for setting in settings]
    overrides += ["phases.ppo.sampler.max_new_tokens=24", "compilation_cache=null", f"run_dir={tmp_path}"]
    overrides += ["scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 0, ppo: 1}}", comparison]
    config = Path(__file__).parents[2] / "configs" / "debug" / "hybrid.yaml"
    built = build(load_config(config, overrides))
    _, metrics = built.phases["ppo"].step(built.init(), built.key)
    assert metrics["ppo/first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/penalty"] > 0.9
    assert 0 < metrics["ppo/eos_fraction"] < 1
    assert metrics["ppo/shaped_score"] == pytest.approx(0.0, abs=1e-6)
    # A loss weighs tokens alike, not responses, and those that ended are shorter: it is not exactly 0.
    assert metrics["ppo/policy_loss"] == pytest.approx(0.0, abs=0.05)
