"""PPO's minibatches in float16, and those that meet NaN; how much arithmetic a step is said to need."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.batches import Rollout
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.sft_mix import SFTMix
from hybrid_jax.phases.step_flops import sft_flops
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.testing import PrefixTable
from hybrid_jax.training.loss_scale import DynamicLossScale
from hybrid_jax.training.nonfinite import FINE, tensor_names
from hybrid_jax.training.optimizers import SGD, Constant
from hybrid_jax.training.state import TrainState

ROWS, PROMPT, RESPONSE, VOCABULARY = 8, 3, 4, 11
DECODER = DecoderConfig(num_layers=1, width=16, num_heads=2, max_length=16)
REWARD = CompositeReward({"count": Part(TokenCount(weights={2: 1.0}))})
SETTINGS = PPO(
    reward=REWARD,
    prompts_per_step=ROWS,
    sampler=Ancestral(max_new_tokens=RESPONSE),
    epochs=1,
    minibatches=4,
    optimizer=SGD(learning_rate=0.1, schedule=Constant()),
)


def functions(dtype="float32") -> PolicyGradientFunctions:
    model = replace(DECODER, dtype=dtype).build(VOCABULARY)
    return PolicyGradientFunctions(SETTINGS, model, eos_ids=(0,), name="ppo", optimizer_key="ppo")


def state_of(ppo, scaling=None) -> TrainState:
    model = jax.tree.map(lambda x: 3 * x, ppo.model.init(jax.random.key(0)))
    params = {"model": model, **ppo.init_value(model)}
    transform = SETTINGS.optimizer.transform()
    extra = {ppo.kl_key: SETTINGS.kl_control.init()} | ({"loss_scale": scaling.init()} if scaling else {})
    return TrainState(
        params=params, opt_state={"ppo": {g: transform.init(p) for g, p in params.items()}}, extra=extra
    )


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Random answers, learned from at random."""
    draw = np.random.default_rng(0)
    mask = jnp.ones((ROWS, RESPONSE), bool)
    numbers = [jnp.asarray(draw.normal(0, 1, mask.shape), jnp.float32) for _ in range(3)]
    return Rollout(
        tokens=jnp.asarray(draw.integers(0, VOCABULARY, (ROWS, PROMPT + RESPONSE)), jnp.int32),
        attention_mask=jnp.ones((ROWS, PROMPT + RESPONSE), bool),
        action_mask=mask,
        log_probs=jnp.full(mask.shape, -2.4),
        group=jnp.arange(ROWS),
        values=numbers[0],
        advantages=numbers[1],
        returns=numbers[2],
        loss_weights=mask.astype(jnp.float32),
        loss_shares=jnp.full(ROWS, float(RESPONSE)),
    )


def updated(ppo, state, rollout):
    return jax.jit(ppo.update, static_argnums=5)(
        state, rollout, None, jax.random.key(0), 0.1, ("model", "ppo/value")
    )


def test_a_minibatch_that_meets_nan_is_left_out_and_reported(rollout):
    ppo = functions()
    state = state_of(ppo)
    bad = replace(rollout, advantages=rollout.advantages.at[5, 2].set(jnp.nan))
    new, metrics = updated(ppo, state, bad)
    assert int(metrics["updates"]) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert tensor_names(state.params)[int(metrics["nonfinite"])] == "final_norm/bias"  # the nearest to the loss
    assert not np.isfinite(metrics["policy_loss"])  # the log shows it
    _, fine = updated(ppo, state, rollout)
    assert (int(fine["updates"]), int(fine["nonfinite"])) == (4, FINE)


@pytest.mark.slow
def test_ppo_in_float16_learns_what_it_learns_in_float32(rollout):
    full, _ = updated(functions(), state_of(functions()), rollout)
    half, metrics = updated(functions("float16"), state_of(functions("float16"), DynamicLossScale()), rollout)
    start = state_of(functions()).params
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), full.params, start)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), full.params, half.params)
    assert max(jax.tree.leaves(apart)) < 0.01 * max(jax.tree.leaves(moved))
    assert int(metrics["updates"]) == 4
    assert float(metrics["loss_scale"]) == 2.0**15
    assert int(half.extra["loss_scale"].good_steps) == 4


def test_an_overflow_in_a_minibatch_halves_the_scale_for_the_next_one(rollout):
    ppo, high = functions("float16"), DynamicLossScale(initial=2.0**24)
    faint = replace(rollout, advantages=2.0**-6 * rollout.advantages)
    new, metrics = updated(ppo, state_of(ppo, high), faint)
    taken, scale = int(metrics["updates"]), float(new.extra["loss_scale"].scale)
    assert 0 < taken < 4
    assert scale == 2.0 ** (24 - (4 - taken))
    assert int(metrics["nonfinite"]) == FINE
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params))
    assert np.isfinite(metrics["policy_loss"])
    assert np.isfinite(metrics["grad_norm"])  # means are over what was taken


def test_the_arithmetic_of_an_sft_step_by_hand():
    """One layer, D = 16, F = 64, V = 11: N = 4·16² + 2·16·64 + 16·11 = 3248; attention 4·16·(T + 1)/2."""
    model = DECODER.build(VOCABULARY)
    assert sft_flops(model, 5, 8) == {"flops": 3 * 5 * 8 * (2 * 3248 + 4 * 16 * 4.5)}
    assert sft_flops(PrefixTable(), 5, 8) == {}


def test_the_arithmetic_of_a_ppo_step_by_hand():
    body, head = 2 * (4 * 16**2 + 2 * 16 * 64), 2 * 16 * 11

    def read(rows, length, heads):
        return rows * length * (body + 4 * 16 * (length + 1) / 2) + heads * head

    def flops(settings=SETTINGS, trains_policy=True):
        return settings.flops(DECODER.build(VOCABULARY), 3, 20, trains_policy)["flops"]

    prefill, answered = read(8, 3, 8), read(8, 7, 32)
    rollout = prefill + (answered - prefill) * 20 / 32
    score = read(8, 7, 0) + answered  # values, and one reference
    assert flops() == pytest.approx(rollout + score + 3 * answered)
    assert flops(replace(SETTINGS, epochs=2)) == pytest.approx(rollout + score + 6 * answered)
    assert flops(trains_policy=False) == pytest.approx(rollout + score + answered)
    separate = replace(SETTINGS, value_network="separate")
    assert flops(separate) == pytest.approx(rollout + score + 3 * answered + 3 * read(8, 7, 0))
    mixed = replace(SETTINGS, sft_mix=SFTMix(coef=1.0, batch_size=2, length=5))
    assert flops(mixed) == pytest.approx(rollout + score + 3 * answered + 3 * read(8, 5, 40))
    assert SETTINGS.flops(PrefixTable(), 3, 20) == {}
