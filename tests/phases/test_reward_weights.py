"""What weights of rewards do to the policy that real PPO finds, and how they are learnt through its update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl import FixedKL
from hybrid_jax.core.batches import Rollout
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.references import Reference
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import SEQUENCES, PrefixTable, optimum, reference_params, true_reward
from hybrid_jax.training.optimizers import SGD, Adam, Constant, Linear
from hybrid_jax.training.state import TrainState

THOROUGHLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # a long run


class Bandit(PrefixTable):
    """One response token, the same whatever the prompt."""

    def hidden(self, params, tokens, attention_mask=None, *, dropout_key=None):
        return jnp.ones((*tokens.shape, 1))


ARMS = Bandit(vocab_size=4, width=1, max_length=2)
REFERENCE = np.array([0.4, 0.3, 0.2, 0.1])


def functions(model, rows, reward, **settings) -> PolicyGradientFunctions:
    config = PPO(
        reward=reward,
        prompts_per_step=rows,
        sampler=Ancestral(max_new_tokens=model.max_length - 1),
        missing_eos_penalty=None,
        whiten_advantages=False,
        value_clip_range=None,
        value_coef=0.5,
        **settings,
    )
    return PolicyGradientFunctions(config, model, eos_ids=(), name="ppo", optimizer_key="ppo")


def state_of(ppo, policy) -> TrainState:
    params = {"model": policy, **ppo.init_value(policy)}
    transform = ppo.config.optimizer.transform()
    return TrainState(
        params=params,
        opt_state={"ppo": {group: transform.init(tree) for group, tree in params.items()}},
        extra={ppo.kl_key: ppo.config.kl_control.init()},
    )


def prompts(rows):
    return jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool)


def rewarded(scored, scores):
    return scored.replace(scores=scores, plain_scores=scores)


def composite(first, second) -> CompositeReward:
    """``first`` r_1 + ``second`` r_2 with r_1 = [0, 1, 2, -1] and r_2 = [1, 1, -1, -1]."""
    rewards = {"one": {1: 1.0, 2: 2.0, 3: -1.0}, "two": {0: 1.0, 1: 1.0, 2: -1.0, 3: -1.0}}
    weights = {"one": first, "two": second}
    return CompositeReward({n: Part(TokenCount(weights=worth), weights[n]) for n, worth in rewards.items()})


def values_of(reward, scored):
    """The weighted value of each part, [parts B]."""
    parts = [part.reward for part in reward.parts.values()]
    seen = scored.tokens, scored.attention_mask, scored.action_mask
    return jnp.stack([part.score_tokens(*seen) for part in parts])


def test_every_weighting_of_two_rewards_leads_to_its_own_closed_form():
    """π* ∝ π_ref exp((w_1 r_1 + w_2 r_2)/β); the first weighting is the bandit of the literature's numbers."""
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0], [1.0, -0.5], [0.0, 0.0]], np.float32)
    arms = np.array([[0.0, 1.0, 2.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    rows, steps, reward = 512, 400, composite(1.0, 1.0)
    optimizer = Adam(learning_rate=0.1, schedule=Linear(), max_grad_norm=None)
    ppo = functions(ARMS, rows, reward, kl_control=FixedKL(0.5), epochs=2, optimizer=optimizer)
    policy = {"table": jnp.log(jnp.asarray(REFERENCE, jnp.float32))[None]}
    references = {"sft": policy}

    def run(weights):
        def iteration(state, step):
            sample_key, learn_key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
            samples = ppo.sample(state.params["model"], *prompts(rows), sample_key)
            scored = ppo.score(state.params, references, *prompts(rows), samples)
            scores = weights @ values_of(reward, scored)
            rate = ppo.config.optimizer.rate(step, steps)
            return ppo.learn(state, rewarded(scored, scores), None, learn_key, rate)[0], None

        state, _ = jax.lax.scan(iteration, state_of(ppo, policy), jnp.arange(steps))
        return jax.nn.softmax(state.params["model"]["table"][0])

    found = np.asarray(jax.jit(jax.vmap(run), compiler_options=THOROUGHLY)(weights))
    expected = [optimum(REFERENCE, one @ arms, 0.5) for one in weights]
    assert expected[0] == pytest.approx([0.029521, 0.163597, 0.805884, 0.000999], abs=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    tokens = jnp.concatenate([jnp.zeros((4, 1), jnp.int32), jnp.arange(4)[:, None]], axis=1)
    for one in weights:  # what was learnt from is what the composite of these weights gives
        scores = composite(*one.tolist()).score_tokens(tokens, tokens >= 0, jnp.ones((4, 1), bool))
        np.testing.assert_allclose(scores, one @ arms, atol=1e-6)


def test_at_the_optimum_of_two_references_every_answer_returns_the_same_and_that_is_the_optimal_objective():
    """r − β Σ a_i log π*/π_i = J* = β log Σ Π π_i^a_i exp(r/β), whatever the answer: no advantage is left."""
    policies = {"one": REFERENCE, "two": REFERENCE[::-1]}
    best = np.array([0.018101, 0.134631, 0.845861, 0.001407])
    ppo = functions(
        ARMS, 4, composite(1.0, 0.0), references={"one": Reference(weight=0.7), "two": Reference(weight=0.3)}
    )
    arms = jnp.arange(4)[:, None]
    every = jnp.ones((4, 1), bool)
    scored = Rollout(
        tokens=jnp.concatenate([jnp.zeros((4, 1), jnp.int32), arms], axis=1),
        attention_mask=jnp.ones((4, 2), bool),
        action_mask=every,
        log_probs=jnp.log(best)[:, None],
        values=jnp.zeros((4, 1)),
        reference_log_probs={name: jnp.log(policy)[:, None] for name, policy in policies.items()},
        group=jnp.arange(4),
    )
    scored = rewarded(scored, jnp.array([0.0, 1.0, 2.0, -1.0]))
    rollout, _ = ppo.advantages(scored, jnp.asarray(0.5))
    assert np.asarray(rollout.returns[:, 0]) == pytest.approx(1.3398012, abs=2e-4)  # six digits of 0.0014
    assert best @ np.asarray(rollout.returns[:, 0]) == pytest.approx(1.3398012, abs=1e-6)


def test_the_whole_ppo_update_is_differentiable_in_the_weights_of_the_rewards():
    """d J_true(θ′(w))/dw through two real epochs, J the exact sum over all 27 responses.

    Advantages are not stopped anywhere: `token_rewards`, `gae` and the loss keep the path from w.
    The step of the differences is 0.1: J in float32 is known to 6e-8, so they are to 6e-7, 1e-4 of the smaller
    derivative; what a step leaves out is less, for with plain gradient descent θ′ is nearly linear in w.
    """
    rows, width = 256, 0.1
    reward = CompositeReward(
        {
            "twos": Part(TokenCount(weights={2: 1.0})),
            "start": Part(TokenCount(weights={}, first_token_weights={1: -0.5})),
        }
    )
    ppo = functions(
        PrefixTable(),
        rows,
        reward,
        epochs=2,
        optimizer=SGD(learning_rate=1.0, schedule=Constant(), max_grad_norm=None),
    )
    state = state_of(ppo, reference_params())
    every = jnp.concatenate([jnp.zeros((27, 1), jnp.int32), jnp.asarray(SEQUENCES)], axis=1)

    def after(weights):
        samples = ppo.sample(state.params["model"], *prompts(rows), jax.random.key(0))
        scored = ppo.score(state.params, {"sft": state.params["model"]}, *prompts(rows), samples)
        scores = weights @ values_of(reward, scored)
        moved, metrics = ppo.learn(state, rewarded(scored, scores), None, jax.random.key(1), 1.0)
        logits = PrefixTable().apply(moved.params["model"], every).logits[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(SEQUENCES)[..., None], axis=2)
        return jnp.exp(chosen.sum(axis=(1, 2))) @ true_reward(), metrics["clip_fraction"]

    start = np.array([1.0, 0.5], np.float32)
    around = [start, *(start + width * np.eye(2)), *(start - width * np.eye(2))]
    both = jax.jit(jax.vmap(jax.value_and_grad(after, has_aux=True)))
    (outcomes, clipped), gradients = both(np.asarray(around, np.float32))
    assert not np.asarray(clipped).any()  # else a response crosses the edge of the clip, where there is a kink
    differences = np.asarray(outcomes[1:3] - outcomes[3:], np.float64) / (2 * width)
    np.testing.assert_allclose(gradients[0], differences, rtol=1e-3)
    assert np.abs(gradients[0]).min() > 5e-3
