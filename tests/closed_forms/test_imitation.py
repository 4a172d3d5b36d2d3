"""Imitation of one's own best answers, against sums over the four arms and the 27 responses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Rollout
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.phases.imitation import Imitation, ImitationFunctions
from hybrid_jax.testing import (
    SEQUENCES,
    PrefixTable,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.update import gradients

REFERENCE = sequence_probabilities(reference_params())
BANDIT = {"model": "worlds:Bandit", "tokenizer": {"name": "worlds:Digits", "count": 4}}
VALUES = [0.0, 1.0, 2.0, -1.0]  # of the arms, which have the probabilities .4 .3 .2 .1
BEST_OF = {  # score of the best of n by its law F^n − F⁻^n, and its standard deviation
    2: (1.1, 0.83),
    4: (1.5278, 0.63),
    8: (1.828322, 0.41),
}
ARM = {"name": "token_count", "weights": dict(enumerate(VALUES))}
PROMPTS = 1024


def all_sequences(**fields: Any) -> Rollout:
    """Each of the 27 responses once, as answers to one prompt."""
    tokens = jnp.asarray(np.hstack([np.zeros((27, 1), int), SEQUENCES]), jnp.int32)
    made: dict[str, Any] = {
        "tokens": tokens,
        "attention_mask": jnp.ones(tokens.shape, bool),
        "action_mask": jnp.ones((27, 3), bool),
        "log_probs": jnp.zeros((27, 3)),
        "group": jnp.zeros(27, jnp.int32),
    }
    return Rollout(**{**made, **fields})


@pytest.mark.parametrize("microbatches", [1, 3])
def test_weights_by_score_have_the_gradient_of_the_cross_entropy_from_the_optimum(microbatches):
    """With scores r + β log π_ref, softmax(scores / β) over all responses is π* itself."""
    beta = 0.5
    scores = jnp.asarray(true_reward() + beta * np.log(REFERENCE), jnp.float32)
    settings = {"reward": {"parts": {"r": {"reward": {"name": "length", "target": 1}}}}, "beta": beta}
    settings |= {"prompts_per_step": 1, "samples_per_prompt": 27, "learns": "weighted"}
    config = parse(Imitation, {**settings, "sampler": {"max_new_tokens": 3}})
    made = ImitationFunctions(config, PrefixTable(), (), "imitation", "imitation")
    chosen = made.chosen(all_sequences(scores=scores, plain_scores=scores))
    best = optimum(REFERENCE, true_reward(), beta)
    np.testing.assert_allclose(chosen[1] / 27, best, rtol=2e-5)

    def cross_entropy(params):
        log_probs, place = jax.nn.log_softmax(params["table"]), jnp.zeros(27, int)
        total = jnp.zeros(27)
        for tokens in SEQUENCES.T:
            total, place = total + log_probs[place, tokens], 3 * place + 1 + tokens
        return -jnp.sum(jnp.asarray(best) * total) / 3  # three tokens each

    params = {"table": jnp.asarray(np.random.default_rng(0).normal(size=(13, 3)), jnp.float32)}
    grads, metrics = gradients(
        made.objective(), {"model": params}, (chosen, None), jax.random.key(0), microbatches, None
    )
    expected, slope = jax.value_and_grad(cross_entropy)(params)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(grads["model"]["table"], slope["table"], atol=1e-6)


@pytest.mark.parametrize(
    ("n", "settings"),
    [
        (2, {"samples_per_prompt": 2, "learns": "best", "sampler": {"max_new_tokens": 1}}),
        pytest.param(
            8,
            {"samples_per_prompt": 8, "learns": "best", "sampler": {"max_new_tokens": 1}},
            marks=pytest.mark.slow,
        ),
        (4, {"sampler": {"name": "best_of_n", "n": 4, "max_new_tokens": 1, "reward": ARM}}),
    ],
)
def test_the_best_of_n_is_learned_whether_the_phase_or_the_sampler_chooses(n, settings, built):
    """The mean score of what a step learns has the mean of the law of best of n."""
    reward = {"parts": {"arm": {"reward": ARM}}}
    phase = {"name": "imitation", "prompts_per_step": PROMPTS, "reward": reward, **settings}
    experiment = built({"imitation": phase}, 1, **BANDIT)
    _, metrics = experiment.phases["imitation"].step(experiment.init(), jax.random.key(1))
    mean, deviation = BEST_OF[n]
    score = float(metrics["imitation/learned_score"])
    assert abs(score - mean) < 4 * deviation / PROMPTS**0.5
    assert float(metrics["imitation/learned"]) == 1


def test_answers_below_the_threshold_teach_nothing(built):
    """With a threshold that no arm reaches nothing moves; with 1 the two best arms keep their odds, 3 to 2."""
    phase = {
        "name": "imitation",
        "prompts_per_step": PROMPTS,
        "sampler": {"max_new_tokens": 1},
        "reward": {"parts": {"arm": {"reward": ARM}}},
        "optimizer": {"name": "adam", "learning_rate": 0.1, "max_grad_norm": None},
    }
    none = built({"imitation": {**phase, "at_least": 3}}, 1, **BANDIT)
    state = none.init()
    before = np.asarray(state.policy["table"])
    state = take_step(none, none.phases["imitation"], state)
    np.testing.assert_array_equal(state.policy["table"], before)
    some = built({"imitation": {**phase, "at_least": 1}}, 60, **BANDIT)
    state = some.init()
    for _ in range(60):
        state = take_step(some, some.phases["imitation"], state)
    arms = np.exp(np.asarray(state.policy["table"], float)[0, :4])
    arms /= arms.sum()
    assert arms[1] + arms[2] > 0.95
    assert arms[1] / arms[2] == pytest.approx(1.5, rel=0.2)


@pytest.mark.slow
def test_imitating_the_states_of_a_chain_ends_at_the_best_response(learned):
    sampler = {"name": "metropolis", "max_new_tokens": 3, "moves": 4, "beta": 1.0}
    reward = {"name": "token_count", "weights": {2: 1.0}, "first_token_weights": {1: -0.5}}
    phase = {
        "name": "imitation",
        "prompts_per_step": 128,
        "sampler": {**sampler, "reward": reward},
        "optimizer": {"name": "adam", "learning_rate": 0.1, "max_grad_norm": None},
    }
    policy = learned({"imitation": phase}, 100)
    assert SEQUENCES[policy.argmax()].tolist() == [2, 2, 2]
    assert policy.max() > 0.95


def test_what_waits_for_the_next_step_has_the_same_arrays_at_every_step(built):
    """Else no checkpoint but the first could be read: a sampler that chooses gives no log-probs."""
    phase = {
        "name": "imitation",
        "prompts_per_step": 4,
        "rollout_ahead": True,
        "sampler": {"name": "best_of_n", "n": 2, "max_new_tokens": 1, "reward": ARM},
    }
    experiment = built({"imitation": phase}, 2, **BANDIT)
    state = experiment.init()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state.train.extra)
    for _ in range(2):
        state = take_step(experiment, experiment.phases["imitation"], state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state.train.extra) == shapes


def test_a_bound_below_a_reward_is_refused_in_training_too(built):
    sampler = {"name": "rejection", "n": 2, "max_new_tokens": 1, "reward": ARM, "beta": 1.0, "most": 0.5}
    phase = {"name": "imitation", "prompts_per_step": 64, "sampler": sampler}
    experiment = built({"imitation": phase}, 1, **BANDIT)
    with pytest.raises(UserError, match=r"sampler.most must be at least every reward, got 0.5"):
        take_step(experiment, experiment.phases["imitation"], experiment.init())
