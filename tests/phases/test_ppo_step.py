"""What the host's side of a PPO step hands to the programs, and the keys and rows of the update."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Rollout, Samples, TokenBatch
from hybrid_jax.core.config import parse
from hybrid_jax.experiment import ExperimentConfig, build
from hybrid_jax.models.decoder_config import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.phases.ppo_functions import PPOFunctions, Scored, _epoch_orders
from hybrid_jax.phases.ppo_settings import PPO, SFTMix
from hybrid_jax.phases.sft import sft_losses
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.decode import Sampler
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.optimizers import SGD, Constant
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective, gradients

SETTINGS = {
    "run_dir": "unused",
    "steps": 6,
    "model": {"name": "decoder", "num_layers": 1, "width": 8, "num_heads": 1, "max_length": 256},
    "tokenizer": "bytes",
    "data": {"name": "restaurants"},
    "compilation_cache": None,
    "scheduler": {"name": "alternation", "cycle": {"ppo": 1}},
    "phases": {
        "ppo": {
            **{"prompts_per_step": 2, "max_prompt_length": 128, "minibatches": 2},
            "sampler": {"max_new_tokens": 3},
            "reward": {"parts": {"length": {"reward": {"name": "length", "target": 3}}}},
        }
    },
    "evaluation": {"num_prompts": 0, "num_examples": 0},
}


class Stage:
    """A PPO phase whose programs only write down what they are given, and its steps."""

    def __init__(self, **settings):
        phases = {"ppo": {**SETTINGS["phases"]["ppo"], **settings}}
        self.experiment = build(parse(ExperimentConfig, {**SETTINGS, "phases": phases}))
        self.phase, self.state = self.experiment.phases["ppo"], self.experiment.init()
        self.sampled, self.learnt = [], []
        self.phase._sample, self.phase._score, self.phase._learn = self._sample, self._score, self._learn

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.state = take_step(self.experiment, self.phase, self.state)

    def _sample(self, base, policy, tokens, mask, key):
        self.sampled.append(np.asarray(jax.random.key_data(key)).tolist())
        shape = (len(tokens), 3)
        return Samples(jnp.full(shape, 65, jnp.int32), jnp.zeros(shape), jnp.ones(shape, bool))

    def _score(self, base, params, references, tokens, mask, samples):
        whole = jnp.concatenate([tokens, samples.tokens], axis=1)
        real = jnp.concatenate([mask, samples.response_mask], axis=1)
        zeros = jnp.zeros(samples.tokens.shape)
        return Scored(whole, real, samples.response_mask, zeros, zeros, {"sft": zeros})

    def _learn(self, base, train, scored, scores, examples, key, rate, *, groups, **received):
        self.learnt.append({"groups": groups, "examples": examples, "key": key})
        return train, {}


def test_the_value_warms_up_for_as_many_steps_as_are_set():
    stage = Stage(value_warmup_steps=2)
    stage.steps(4)
    assert [learnt["groups"] for learnt in stage.learnt] == [("value",)] * 2 + [("model", "value")] * 2


def test_every_step_mixes_in_the_next_examples():
    stage = Stage(sft_mix={"coef": 0.1, "batch_size": 3, "length": 256, "packing": False})
    stage.steps(3)
    given = [np.asarray(learnt["examples"].tokens) for learnt in stage.learnt]
    rows = 3 * 2  # of both minibatches
    for step, tokens in enumerate(given):
        np.testing.assert_array_equal(tokens, stage.phase._examples.batch(rows * step, rows).tokens)
    assert len({row.tobytes() for tokens in given for row in tokens}) == 3 * rows
    assert stage.state.cursors["ppo/examples"] == 3 * rows


def test_opponents_and_policy_and_steps_share_no_noise():
    stage = Stage(opponent={"reference": "sft", "num_samples": 2})
    stage.steps(2)
    assert len(stage.sampled) == 2 * 3
    assert len({tuple(key) for key in stage.sampled}) == 2 * 3


# ----------------------------------------------------------------------------------------- the update


ROWS, LENGTH, RESPONSE = 8, 6, 3
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # compiled once, run once
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16)


def functions(model, **settings) -> PPOFunctions:
    config = PPO(
        reward=CompositeReward({"count": Part(TokenCount(weights={"2": 1.0}))}),
        prompts_per_step=ROWS,
        sampler=Sampler(max_new_tokens=RESPONSE),
        optimizer=SGD(learning_rate=0.1, schedule=Constant()),
        **settings,
    )
    return PPOFunctions(config, model, eos_ids=(), name="ppo", optimizer_key="ppo")


def rollout_of(model) -> Rollout:
    draw = np.random.default_rng(0)
    mask = np.arange(RESPONSE) < draw.integers(1, RESPONSE + 1, (ROWS, 1))
    zeros = jnp.zeros(mask.shape)
    prompt = jnp.ones((ROWS, LENGTH - RESPONSE), bool)
    return Rollout(
        tokens=jnp.asarray(draw.integers(0, model.vocab_size, (ROWS, LENGTH)), jnp.int32),
        attention_mask=jnp.concatenate([prompt, jnp.asarray(mask)], axis=1),
        response_mask=jnp.asarray(mask),
        log_probs=zeros,
        values=zeros,
        advantages=jnp.ones(mask.shape),
        returns=zeros,
    )


def state_of(ppo) -> TrainState:
    policy = ppo.model.init(jax.random.key(0))
    params = {"model": policy, "value": ppo.init_value(policy)}
    transform = ppo.config.optimizer.transform()
    return TrainState(params, {"ppo": {group: transform.init(tree) for group, tree in params.items()}}, {})


def test_every_minibatch_mixes_in_examples_of_its_own():
    model = MODEL.build(11)
    ppo = functions(model, epochs=1, minibatches=2, sft_mix=SFTMix(coef=0.1, batch_size=2, length=6))
    state, draw = state_of(ppo), np.random.default_rng(1)
    batch = TokenBatch(
        tokens=jnp.asarray(draw.integers(0, 11, (4, 6)), jnp.int32),
        segment_ids=jnp.ones((4, 6), jnp.int32),
        loss_mask=jnp.ones((4, 6), bool),
    )
    update = jax.jit(ppo.update, static_argnums=5, compiler_options=FAST)
    _, metrics = update(state, rollout_of(model), batch, jax.random.key(0), 0.0, ("model", "value"))
    # At rate 0 both see the same policy: the mean over minibatches is that over all examples.
    policy = state.params["model"]
    each = jax.jit(lambda batch: sft_losses(model, policy, batch)["loss"].mean(), compiler_options=FAST)
    halves = [float(each(jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch))) for i in range(2)]
    assert abs(halves[0] - halves[1]) > 1e-3
    assert float(metrics["sft_loss"]) == pytest.approx(sum(halves) / 2, abs=1e-6)


def test_every_epoch_takes_all_rows_in_an_order_of_its_own():
    orders = np.asarray(_epoch_orders(jax.random.key(0), 16, 3))
    np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(16), (3, 16)))
    assert len({order.tobytes() for order in orders}) == 3
    assert not np.array_equal(orders, _epoch_orders(jax.random.key(1), 16, 3))


def test_every_minibatch_learns_from_rows_of_its_own():
    """Each row's number stands in its returns."""
    model = MODEL.build(11)
    ppo = functions(model, epochs=3, minibatches=2, value_coef=0.0)
    seen = []

    class Watched(PPOFunctions):
        def losses(self, params, rollout, examples):
            jax.debug.callback(lambda rows: seen.append(np.asarray(rows).tolist()), rollout.returns[:, 0])
            return super().losses(params, rollout, examples)

    watched = Watched(ppo.config, model, (), "ppo", "ppo")
    numbered = rollout_of(model).replace(returns=jnp.tile(jnp.arange(8.0)[:, None], (1, RESPONSE)))
    update = jax.jit(watched.update, static_argnums=5, compiler_options=FAST)
    jax.block_until_ready(update(state_of(ppo), numbered, None, jax.random.key(0), 0.0, ("value",)))
    jax.effects_barrier()
    epochs = [seen[i] + seen[i + 1] for i in range(0, 6, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len(set(map(tuple, epochs))) == 3


def test_every_microbatch_has_a_key_of_its_own():
    def loss(params, batch, key):
        number = jax.random.uniform(key)
        return {"loss": Sum(params["w"] * 0.0, jnp.ones(()))}, {
            "key": Sum(number, jnp.ones(())),
            "square": Sum(number**2, jnp.ones(())),
        }

    objective = Objective(loss, lambda batch: {"loss": 4}, {"loss": 1.0})
    _, means = gradients(objective, {"w": jnp.ones(())}, jnp.zeros(4), jax.random.key(0), microbatches=4)
    expected = np.asarray([jax.random.uniform(key) for key in jax.random.split(jax.random.key(0), 4)])
    assert float(means["key"]) == pytest.approx(expected.mean(), rel=1e-6)
    assert float(means["square"] - means["key"] ** 2) == pytest.approx(expected.var(), rel=1e-4)
    assert expected.var() > 0.01


def test_router_losses_weigh_by_all_tokens_that_the_router_saw():
    experts = Experts(count=2, per_token=1, width=4, balance_coef=0.5, z_coef=0.1)
    model = replace(MODEL, mlp="gated", experts=experts).build(11)
    ppo, rollout = functions(model), rollout_of(model)
    responses = int(rollout.response_mask.sum())
    weights = ppo.objective({}).weights((rollout, None))
    assert {name: int(weight) for name, weight in weights.items()} == {
        "policy_loss": responses,
        "value_loss": responses,
        "router_balance": ROWS * (LENGTH - RESPONSE) + responses,
        "router_z": ROWS * (LENGTH - RESPONSE) + responses,
    }
