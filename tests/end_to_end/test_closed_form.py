"""PPO's own code path finds the closed-form optimum of KL-regularised reward on the 27-sequence model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.algorithms.kl import FixedKL
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.references import Reference
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import (
    STEPS,
    PrefixTable,
    objective,
    optimum,
    reference_params,
    sequence_probabilities,
    true_reward,
)
from hybrid_jax.training.optimizers import Adam, Linear
from hybrid_jax.training.state import TrainState

BETA, ROWS = 0.5, 512
THOROUGHLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}  # a long run


def ppo_functions(**settings) -> PolicyGradientFunctions:
    reward = TokenCount(weights={2: 1.0}, first_token_weights={1: -0.5})
    config = PPO(
        **{
            "reward": CompositeReward({"count": Part(reward)}),
            "prompts_per_step": ROWS,
            "sampler": Ancestral(max_new_tokens=STEPS),
            "kl_control": FixedKL(BETA),
            "missing_eos_penalty": None,
            "value_clip_range": None,
            "value_coef": 0.5,
            "optimizer": Adam(learning_rate=0.05, schedule=Linear(), max_grad_norm=None),
            **settings,
        }
    )
    return PolicyGradientFunctions(config, PrefixTable(), eos_ids=(), name="ppo", optimizer_key="ppo")


def initial_state(functions: PolicyGradientFunctions) -> TrainState:
    params = {"model": reference_params(), **functions.init_value(reference_params())}
    transform = functions.config.optimizer.transform()
    return TrainState(
        params=params,
        opt_state={"ppo": {group: transform.init(tree) for group, tree in params.items()}},
        extra={functions.kl_key: functions.config.kl_control.init()},
    )


def run(functions: PolicyGradientFunctions, key, steps: int, references=None, beta=None):
    """``steps`` whole PPO iterations in one program."""
    references = references or {name: reference_params() for name in functions.config.references}
    rows = functions.config.prompts_per_step
    tokens, mask = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool)
    state = initial_state(functions)
    if beta is not None:
        state = state.replace(extra={functions.kl_key: beta})

    def iteration(state, step):
        rate = functions.config.optimizer.rate(step, steps)
        key_ = jax.random.fold_in(key, step)
        return functions.iteration(state, references, tokens, mask, key_, rate)

    return jax.lax.scan(iteration, state, jnp.arange(steps))


def total_variation(p, q) -> float:
    return 0.5 * float(np.abs(p - q).sum())


def test_the_enumerated_model_has_the_published_optimum():
    reference = sequence_probabilities(reference_params())
    best = optimum(reference, true_reward(), BETA)
    assert objective(best, reference, true_reward(), BETA) == pytest.approx(1.5189154, abs=1e-6)
    assert best @ true_reward() == pytest.approx(2.4668575, abs=1e-6)
    assert best @ np.log(best / reference) == pytest.approx(1.8958842, abs=1e-6)
    assert best[-1] == pytest.approx(0.6188762, abs=1e-6)


def test_ppo_reaches_the_closed_form_optimum():
    functions = ppo_functions()
    state, metrics = jax.jit(lambda key: run(functions, key, 600), compiler_options=THOROUGHLY)(
        jax.random.key(0)
    )
    reference, reward = sequence_probabilities(reference_params()), true_reward()
    policy, best = sequence_probabilities(state.params["model"]), optimum(reference, reward, BETA)
    gap = objective(best, reference, reward, BETA) - objective(policy, reference, reward, BETA)
    assert total_variation(policy, best) < 0.02
    assert 0 <= gap < 1e-3
    assert metrics["first_ratio"] == pytest.approx(np.ones(600), abs=1e-6)
    assert metrics["kl"][0] == 0  # the first rollout of a fresh policy against an equal reference


def test_eight_seeds_and_strengths_train_in_one_program_each_to_its_own_optimum():
    functions = ppo_functions(prompts_per_step=256)
    betas, seeds = jnp.repeat(jnp.array([0.5, 0.75, 1.0, 2.0]), 2), jnp.arange(8)

    def whole_run(seed, beta):
        return run(functions, jax.random.key(seed), 250, beta=beta)[0].params["model"]

    many = jax.jit(jax.vmap(whole_run), compiler_options=THOROUGHLY)(seeds, betas)
    reference, reward = sequence_probabilities(reference_params()), true_reward()
    for lane in range(8):
        policy = sequence_probabilities({"table": many["table"][lane]})
        best = optimum(reference, reward, float(betas[lane]))
        assert total_variation(policy, best) < 0.02
    tables = np.asarray(many["table"])
    assert np.abs(tables[0] - tables[1]).max() > 1e-4  # the same strength, other noise


def test_two_references_give_their_weighted_geometric_mean():
    """Penalties β Σ w_i KL(π ‖ π_i) have the optimum π* ∝ Π π_i^{w_i/Σw} exp(r/(β Σw))."""
    weights = {"chain": 0.4, "zeros": 0.6}
    functions = ppo_functions(references={n: Reference(weight=w) for n, w in weights.items()})
    zeros = {"table": jnp.log(jnp.tile(jnp.array([0.9, 0.05, 0.05]), (13, 1)))}
    references = {"chain": reference_params(), "zeros": zeros}
    trained = jax.jit(lambda key: run(functions, key, 400, references), compiler_options=THOROUGHLY)
    state, _ = trained(jax.random.key(0))
    policy, chain, other = (sequence_probabilities(p) for p in (state.params["model"], *references.values()))
    geometric = optimum(chain**0.4 * other**0.6, true_reward(), BETA)
    arithmetic = optimum(0.4 * chain + 0.6 * other, true_reward(), BETA)
    assert total_variation(geometric, arithmetic) > 0.4  # what averaging probabilities would give
    assert total_variation(policy, geometric) < 0.01
