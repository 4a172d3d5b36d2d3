"""Rollouts of another policy: the exact expected gradient over the arms of a bandit, 0 at the optimum."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Rollout
from hybrid_jax.core.config import parse
from hybrid_jax.phases.policy_gradient import PolicyGradient
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.testing import optimum
from hybrid_jax.training.state import TrainState

REFERENCE, REWARD, BETA = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1.0, 2.0, -1.0]), 0.5
BEHAVIOUR = np.array([0.1, 0.2, 0.6, 0.1])
DRAWN = np.repeat(np.arange(4), [1, 2, 6, 1])  # each arm as often as the other policy draws it out of ten
REINFORCE = {"name": "returns"}


@pytest.mark.parametrize("objective", ["clipped", "score_function", "soft"])
@pytest.mark.parametrize(
    "method",
    [
        {"advantage": REINFORCE, "correction": {"kind": "truncated", "cap": 100.0}},
        {"advantage": REINFORCE, "correction": {"kind": "sequence_mask", "cap": 100.0}},
        {"advantage": {"name": "vtrace", "rho_cap": 100.0}, "value_coef": 0.0},
    ],
    ids=["truncated", "sequence_mask", "vtrace"],
)
def test_at_the_optimum_the_gradient_on_what_another_policy_drew_is_zero(method, objective, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from worlds import Arms

    best = optimum(REFERENCE, REWARD, BETA)
    policy = {"table": jnp.asarray(np.log(best)[None], jnp.float32)}
    assert np.abs(_gradient(Arms(), method, objective, policy)[:4]).max() < 1e-5
    # Elsewhere there is one, that of E r − β KL: π_a (r_a − β log π_a / π_ref,a − mean).
    uniform = np.full(4, 0.25)
    policy = {"table": jnp.asarray(np.log(uniform)[None], jnp.float32)}
    worth = REWARD - BETA * np.log(uniform / REFERENCE)
    expected = -uniform * (worth - uniform @ worth)
    np.testing.assert_allclose(_gradient(Arms(), method, objective, policy)[:4], expected, atol=1e-5)


def _gradient(model, method, objective, policy):
    """Of the loss by the scores of the arms, on ten draws of the other policy."""
    settings = {
        **method,
        "reward": {"parts": {"count": {"reward": {"name": "token_count", "weights": {}}}}},
        "objective": {"name": objective},
        "prompts_per_step": len(DRAWN),
        "sampler": {"max_new_tokens": 1},
        "missing_eos_penalty": None,
        "kl_control": {"name": "fixed", "coef": BETA},
        "whiten_advantages": False,
    }
    functions = PolicyGradientFunctions(parse(PolicyGradient, settings), model, (4,), "rl", "rl")
    drawn = jnp.asarray(DRAWN)[:, None]
    zeros, there = jnp.zeros(drawn.shape), jnp.ones(drawn.shape, bool)
    scores = jnp.asarray(REWARD[DRAWN], jnp.float32)
    rollout = Rollout(
        tokens=jnp.concatenate([jnp.zeros_like(drawn), drawn], axis=1),
        attention_mask=jnp.ones((len(drawn), 2), bool),
        action_mask=there,
        log_probs=jnp.log(jnp.asarray(BEHAVIOUR, jnp.float32))[drawn],
        group=jnp.arange(len(drawn)),
        reference_log_probs={"sft": jnp.log(jnp.asarray(REFERENCE, jnp.float32))[drawn]},
        values=zeros if functions.config.value else None,
        plain_scores=scores,
        scores=scores,
    )
    params = {"model": policy, **functions.init_value(policy)}
    extra = {functions.kl_key: functions.config.kl_control.init()}
    state = TrainState(params, {}, extra)
    grads, _ = jax.jit(functions.gradient, static_argnames="groups")(
        state, rollout, jax.random.key(0), groups=functions.groups
    )
    return np.asarray(grads["model"]["table"][0])
