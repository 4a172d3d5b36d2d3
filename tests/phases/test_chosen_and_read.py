"""Responses that hold tokens which the policy read and did not choose, against a loop over single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Samples
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral

V, P, R, EOS, TEMPERATURE = 11, 3, 6, 3, 0.8
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16).build(V)
CHOSEN = np.array([[1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]], bool)
READ = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
STARTS = [0, 1, 2, 0]  # of the prompts
DISCOUNT, TRACE, BETA, CLIP = 0.9, 0.7, 0.3, 0.2


@pytest.fixture(scope="module")
def ppo():
    reward = CompositeReward({"count": Part(TokenCount(weights={2: 1.0, 5: -0.7}))})
    config = PPO(
        reward=reward,
        prompts_per_step=4,
        sampler=Ancestral(R, TEMPERATURE),
        discount=DISCOUNT,
        trace=TRACE,
        whiten_advantages=False,
        missing_eos_penalty=None,
    )
    return PolicyGradientFunctions(config, MODEL, (EOS,), "ppo", "ppo")


@pytest.fixture(scope="module")
def rollout(ppo):
    """Params of policy, reference and value; a rewarded rollout; the same read token by token."""
    draw = np.random.default_rng(0)
    policy, reference = (jax.tree.map(lambda x: 5 * x, MODEL.init(jax.random.key(seed))) for seed in (0, 1))
    head = {"kernel": jnp.asarray(draw.normal(0, 0.3, (8, 1)), jnp.float32), "bias": jnp.array([0.2])}
    params = {"model": policy, "ppo/value": {"head": head}}
    prompts, tokens = draw.integers(0, V, (4, P)), draw.integers(0, V, (4, R))
    mask = np.arange(P) >= np.array(STARTS)[:, None]
    behaviour = np.where(CHOSEN, draw.normal(-2, 0.3, CHOSEN.shape), np.nan).astype(np.float32)
    samples = Samples(*map(jnp.asarray, (tokens, np.nan_to_num(behaviour, nan=99.0), CHOSEN, READ)))
    scored = jax.jit(ppo.score)(params, {"sft": reference}, jnp.asarray(prompts), jnp.asarray(mask), samples)
    return params, reference, ppo.rewarded(scored), behaviour.astype(np.float64)


def _read(params, tokens):
    """Hidden states and log-probs of one row without padding, float64."""
    out = MODEL.apply(params, jnp.asarray(tokens)[None])
    logits = np.asarray(out.logits[0], np.float64) / TEMPERATURE
    return np.asarray(out.hidden[0], np.float64), logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.fixture(scope="module")
def loop(rollout):
    """Of each chosen token (column, log-prob, reference's, value, advantage, return), by row; the scores."""
    params, reference, scored, behaviour = rollout
    head = params["ppo/value"]["head"]
    rows, scores = [], []
    for row in range(4):
        prompt = [int(t) for t in scored.tokens[row, STARTS[row] : P]]
        response = [int(scored.tokens[row, P + t]) for t in range(int(READ[row].sum()))]
        hidden, log_probs = _read(params["model"], prompt + response)
        _, of_reference = _read(reference, prompt + response)
        columns = [t for t in range(R) if CHOSEN[row, t]]
        before = [len(prompt) + t - 1 for t in columns]
        own = [log_probs[i, response[t]] for i, t in zip(before, columns, strict=True)]
        theirs = [of_reference[i, response[t]] for i, t in zip(before, columns, strict=True)]
        values = [float(hidden[i] @ np.asarray(head["kernel"])[:, 0] + head["bias"][0]) for i in before]
        score = sum({2: 1.0, 5: -0.7}.get(response[t], 0.0) for t in columns)
        rewards = [-BETA * (behaviour[row, t] - theirs[i]) for i, t in enumerate(columns)]
        rewards[-1] += score
        advantage, advantages = 0.0, []
        for i in reversed(range(len(columns))):
            following = values[i + 1] if i + 1 < len(columns) else 0.0
            advantage = rewards[i] + DISCOUNT * following - values[i] + DISCOUNT * TRACE * advantage
            advantages.insert(0, advantage)
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        rows.append(list(zip(columns, own, theirs, values, advantages, returns, strict=True)))
        scores.append(score)
    return rows, scores


def _column(rows, index):
    found = np.zeros((4, R))
    for row, items in enumerate(rows):
        for item in items:
            found[row, item[0]] = item[index]
    return found


def test_log_probs_values_scores_advantages_and_kl_are_those_of_the_loop(ppo, rollout, loop):
    _, _, scored, behaviour = rollout
    rows, scores = loop
    theirs, values = _column(rows, 2), _column(rows, 3)
    np.testing.assert_allclose(np.where(CHOSEN, scored.reference_log_probs["sft"], 0), theirs, atol=2e-5)
    np.testing.assert_allclose(np.where(CHOSEN, scored.values, 0), values, atol=2e-5)
    np.testing.assert_allclose(scored.scores, scores, atol=1e-6)
    learned, metrics = jax.jit(ppo.advantages)(scored, jnp.float32(BETA))
    np.testing.assert_allclose(learned.advantages, _column(rows, 4), atol=5e-5)
    np.testing.assert_allclose(learned.returns, _column(rows, 5), atol=5e-5)
    kl = np.where(CHOSEN, behaviour - theirs, 0.0).sum(axis=1).mean()
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
    assert metrics["entropy"] == pytest.approx(-behaviour[CHOSEN].mean(), abs=1e-5)


def test_losses_are_sums_over_the_chosen_tokens_alone(ppo, rollout, loop):
    params, _, scored, behaviour = rollout
    learned, _ = jax.jit(ppo.advantages)(scored, jnp.float32(BETA))
    terms, metrics = jax.jit(lambda params, rollout: ppo.losses(params, rollout, None))(params, learned)
    policy = value = ratios = 0.0
    for row, items in enumerate(loop[0]):
        for column, own, _, estimate, advantage, target in items:
            ratio = np.exp(own - behaviour[row, column])
            policy += max(-advantage * ratio, -advantage * np.clip(ratio, 1 - CLIP, 1 + CLIP))
            value += 0.5 * (estimate - target) ** 2  # a fresh value clips nothing
            ratios += ratio
    count = CHOSEN.sum()
    assert float(terms["policy_loss"].weight) == float(terms["value_loss"].weight) == count
    assert terms["policy_loss"].total == pytest.approx(policy, rel=2e-4)
    assert terms["value_loss"].total == pytest.approx(value, rel=2e-4)
    assert metrics["ratio"].mean() == pytest.approx(ratios / count, rel=2e-4)


def test_a_response_has_ended_where_its_last_chosen_token_is_an_end(ppo, rollout):
    """The end of an earlier turn is none of the response, nor is one that was told."""
    tokens = (
        rollout[2].tokens.at[:, P:].set(7).at[0, P + 1].set(EOS).at[1, P + 2].set(EOS).at[3, P + 4].set(EOS)
    )
    complete = ppo.complete(rollout[2].replace(tokens=tokens))
    np.testing.assert_array_equal(complete, [False, True, False, False])
