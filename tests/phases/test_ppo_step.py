"""What the host's side of a PPO step hands to the programs, and the keys and rows of the update."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.arrays import Sum
from hybrid_jax.core.batches import Rollout, Samples, TokenBatch
from hybrid_jax.core.config import parse
from hybrid_jax.experiment import ExperimentConfig, build
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.experts import Experts
from hybrid_jax.phases import minibatches as minibatches_module
from hybrid_jax.phases import sft
from hybrid_jax.phases.minibatches import _epoch_orders
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.ppo import PPO
from hybrid_jax.phases.sft_mix import SFTMix
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training import nonfinite
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
    """Phases whose programs only write down what they are given, and their steps."""

    def __init__(self, cycle=None, **settings):
        phases = {"ppo": {**SETTINGS["phases"]["ppo"], **settings}}
        if cycle is not None:
            phases["sft"] = {"batch_size": 2, "length": 256}
        scheduler = {"name": "alternation", "cycle": cycle or {"ppo": 1}}
        config = {**SETTINGS, "phases": phases, "scheduler": scheduler}
        self.experiment = build(parse(ExperimentConfig, config))
        self.phase, self.state = self.experiment.phases["ppo"], self.experiment.init()
        self.sampled, self.prompts, self.learnt, self.copied = [], [], [], []
        rollouts = self.phase.rollouts
        rollouts._sample, rollouts._score, self.phase._learn = self._sample, self._score, self._learn
        rollouts.references._copy = self._copy
        if cycle is not None:
            self.experiment.phases["sft"]._update = self._update

    def steps(self, count: int) -> None:
        for _ in range(count):
            phase = self.experiment.phases[self.experiment.scheduler.choose(self.state.schedule)]
            self.state = take_step(self.experiment, phase, self.state)

    def _copy(self, trained):
        self.copied.append(self.state.step)
        return trained

    def _update(self, base, references, train, batch, key, rate):
        self.learnt.append({"phase": "sft", "tokens": np.asarray(batch.tokens), "rate": float(rate)})
        return train, {}

    def _sample(self, base, policy, tokens, mask, key):
        self.sampled.append(np.asarray(jax.random.key_data(key)).tolist())
        self.prompts.append(np.asarray(tokens))
        shape = (len(tokens), 3)
        return Samples.chosen(jnp.full(shape, 65, jnp.int32), jnp.zeros(shape), jnp.ones(shape, bool))

    def _score(self, base, params, references, tokens, mask, samples):
        whole = jnp.concatenate([tokens, samples.tokens], axis=1)
        real = jnp.concatenate([mask, samples.action_mask], axis=1)
        zeros = jnp.zeros(samples.tokens.shape)
        rows = jnp.arange(len(tokens))
        return Rollout(whole, real, samples.action_mask, zeros, rows, {"sft": zeros}, values=zeros)

    def _learn(self, base, train, rollout, examples, key, rate, *, groups):
        self.learnt.append({"phase": "ppo", "groups": groups, "examples": examples, "rate": float(rate)})
        return train, {}


def test_the_value_warms_up_for_as_many_steps_as_are_set():
    stage = Stage(value_warmup_steps=2)
    stage.steps(4)
    assert [learnt["groups"] for learnt in stage.learnt] == [("ppo/value",)] * 2 + [("model", "ppo/value")] * 2


def test_every_step_mixes_in_the_next_examples():
    stage = Stage(sft_mix={"coef": 0.1, "batch_size": 3, "length": 256, "packing": False})
    stage.steps(3)
    given = [np.asarray(learnt["examples"].tokens) for learnt in stage.learnt]
    rows = 3 * 2  # of both minibatches
    for step, tokens in enumerate(given):
        np.testing.assert_array_equal(tokens, stage.phase.examples.stream.batch(rows * step, rows).tokens)
    assert len({row.tobytes() for tokens in given for row in tokens}) == 3 * rows
    assert stage.state.cursors["ppo/examples"] == 3 * rows


def test_opponents_and_policy_and_steps_share_no_noise():
    stage = Stage(opponent={"reference": "sft", "num_samples": 2})
    stage.steps(2)
    assert len(stage.sampled) == 2 * 3
    assert len({tuple(key) for key in stage.sampled}) == 2 * 3
    for step in (0, 3):  # a key that draws a row's noise begins nobody else's
        policy = jax.random.wrap_key_data(jnp.asarray(stage.sampled[step], jnp.uint32))
        of_rows = [jax.random.fold_in(policy, row) for row in range(100)]
        below = {
            tuple(jax.random.key_data(key).tolist()) for row in of_rows for key in jax.random.split(row, 3)
        }
        assert not below & {tuple(key) for key in stage.sampled[step + 1 : step + 3]}


def test_every_step_answers_the_next_prompts_each_as_often_as_it_is_sampled():
    stage = Stage(prompts_per_step=2, samples_per_prompt=2)
    stage.steps(3)
    for step, tokens in enumerate(stage.prompts):
        asked = stage.phase.rollouts.prompts.batch(2 * step, 2).tokens
        np.testing.assert_array_equal(tokens, asked[[0, 0, 1, 1]])
    assert stage.state.cursors["ppo"] == 3 * 2


def test_each_phase_reads_on_and_follows_the_schedule_of_its_own_steps():
    stage = Stage(cycle={"sft": 1, "ppo": 1}, optimizer={"name": "adamw", "learning_rate": 1.0})
    stage.experiment.phases["sft"]._rate = stage.phase._rate
    stage.steps(6)
    rates = {name: [x["rate"] for x in stage.learnt if x["phase"] == name] for name in ("sft", "ppo")}
    # Linear over the 3 steps that each phase takes of the 6, whatever stands between them.
    assert rates == {name: pytest.approx([1.0, 2 / 3, 1 / 3]) for name in ("sft", "ppo")}
    rows = [row.tobytes() for learnt in stage.learnt if learnt["phase"] == "sft" for row in learnt["tokens"]]
    assert len(set(rows)) == 3 * 2


def test_a_reference_is_refreshed_where_the_phase_is_entered_and_not_within_it():
    often = {"recent": {"refresh_every_cycles": 1}}
    stage = Stage(cycle={"sft": 1, "ppo": 2}, references=often)
    stage.phase.rollouts._score = lambda *inputs: Stage._score(stage, *inputs).replace(
        reference_log_probs={"recent": jnp.zeros((2, 3))}
    )
    stage.steps(6)
    assert stage.copied == [1, 4]  # SFT takes steps 0 and 3


# ----------------------------------------------------------------------------------------- the update


ROWS, LENGTH, RESPONSE = 8, 6, 3
FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # compiled once, run once
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=16)


def functions(model, **settings) -> PolicyGradientFunctions:
    config = PPO(
        reward=CompositeReward({"count": Part(TokenCount(weights={2: 1.0}))}),
        prompts_per_step=ROWS,
        sampler=Ancestral(max_new_tokens=RESPONSE),
        optimizer=SGD(learning_rate=0.1, schedule=Constant()),
        **settings,
    )
    return PolicyGradientFunctions(config, model, eos_ids=(), name="ppo", optimizer_key="ppo")


def rollout_of(model) -> Rollout:
    draw = np.random.default_rng(0)
    mask = np.arange(RESPONSE) < draw.integers(1, RESPONSE + 1, (ROWS, 1))
    zeros = jnp.zeros(mask.shape)
    prompt = jnp.ones((ROWS, LENGTH - RESPONSE), bool)
    return Rollout(
        tokens=jnp.asarray(draw.integers(0, model.vocab_size, (ROWS, LENGTH)), jnp.int32),
        attention_mask=jnp.concatenate([prompt, jnp.asarray(mask)], axis=1),
        action_mask=jnp.asarray(mask),
        log_probs=zeros,
        group=jnp.arange(ROWS),
        values=zeros,
        advantages=jnp.ones(mask.shape),
        returns=zeros,
        loss_weights=jnp.asarray(mask, jnp.float32),
        loss_shares=jnp.asarray(mask.sum(axis=1), jnp.float32),
    )


@pytest.fixture
def minibatches(monkeypatch):
    """What `update_state` is given: rows, numbered by their returns, first tokens of examples, and the key."""
    seen = []

    def watch(objective, optimizer, state, batch, key, rate, **settings):
        rollout, examples = batch
        first = rate if examples is None else examples.tokens[:, 0]
        given = rollout.returns[:, 0], first, jax.random.key_data(key)
        jax.debug.callback(
            lambda *x: seen.append([tuple(np.ravel(a).tolist()) for a in x]), *given, ordered=True
        )
        metrics = {"ratio": jnp.ones(()), nonfinite.METRIC: jnp.asarray(nonfinite.FINE)}
        return state, metrics, jnp.asarray(True)

    monkeypatch.setattr(minibatches_module, "update_state", watch)

    def run(examples=None, **settings):
        ppo = functions(MODEL.build(11), **settings)
        numbered = rollout_of(ppo.model).replace(returns=jnp.tile(jnp.arange(8.0)[:, None], (1, RESPONSE)))
        state = TrainState(params={"model": {}, "ppo/value": {}}, opt_state={"ppo": {}}, extra={})
        jax.jit(ppo.update, static_argnums=5)(state, numbered, examples, jax.random.key(0), 0.1, ("model",))
        jax.effects_barrier()
        return seen

    return run


def test_every_minibatch_mixes_in_examples_of_its_own(minibatches):
    tokens = jnp.tile(jnp.arange(4)[:, None], (1, 6))
    examples: Any = TokenBatch
    examples = examples(tokens=tokens, segment_ids=tokens + 1, loss_mask=tokens >= 0)
    mix = SFTMix(coef=0.1, batch_size=2, length=6)
    given = minibatches(examples, epochs=2, minibatches=2, sft_mix=mix)
    assert [first for _, first, _ in given] == [(0, 1), (2, 3)] * 2


def test_every_minibatch_has_rows_and_a_key_of_its_own(minibatches):
    given = minibatches(epochs=3, minibatches=2)
    epochs = [given[i][0] + given[i + 1][0] for i in range(0, 6, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(8))] * 3
    assert len(set(epochs)) == 3
    assert len({key for _, _, key in given}) == 6


def test_every_epoch_takes_all_rows_in_an_order_of_its_own():
    orders = np.asarray(_epoch_orders(jax.random.key(0), 16, 3))
    np.testing.assert_array_equal(np.sort(orders), np.broadcast_to(np.arange(16), (3, 16)))
    assert len({order.tobytes() for order in orders}) == 3
    assert not np.array_equal(orders, _epoch_orders(jax.random.key(1), 16, 3))


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


def test_entropy_is_rewarded_and_values_are_weighed_as_set():
    objective = functions(MODEL.build(11), entropy_coef=0.01, value_coef=0.3).objective({})
    assert objective.coefs == {"policy_loss": 1.0, "value_loss": 0.3, "exact_entropy": -0.01}


def test_dropout_reaches_sft_where_it_is_set(monkeypatch):
    keys = []
    monkeypatch.setattr(sft, "sft_losses", lambda model, params, batch, key: keys.append(key) or {})
    for dropout in (True, False):
        sft.sft_objective(MODEL.build(11), dropout=dropout).loss({"model": {}}, None, jax.random.key(5))
    assert keys == [jax.random.key(5), None]


def test_a_response_that_is_left_out_teaches_no_value():
    model = MODEL.build(11)
    ppo, rollout = functions(model), rollout_of(model)
    params = {"model": model.init(jax.random.key(0))}
    params |= ppo.init_value(params["model"])
    shares = rollout.loss_shares.at[0].set(0)

    def value_loss(returns_of_first):
        returns = rollout.returns.at[0].set(returns_of_first)
        batch = replace(rollout, returns=returns, loss_shares=shares)
        weights = ppo.objective({}).weights((batch, None))
        return ppo.losses(params, batch, None)[0]["value_loss"].total, int(weights["value_loss"])

    (there, weight), (other, _) = value_loss(0.0), value_loss(1e3)
    assert float(there) == float(other)
    assert weight == int(rollout.action_mask[1:].sum())


def test_router_losses_weigh_by_all_tokens_that_the_router_saw():
    experts = Experts(count=2, per_token=1, width=4, balance_coef=0.5, z_coef=0.1)
    model = replace(MODEL, mlp="gated", experts=experts).build(11)
    ppo, rollout = functions(model), rollout_of(model)
    responses = int(rollout.action_mask.sum())
    weights = ppo.objective({}).weights((rollout, None))
    assert {name: int(weight) for name, weight in weights.items()} == {
        "policy_loss": responses,
        "value_loss": responses,
        "router_balance": ROWS * (LENGTH - RESPONSE) + responses,
        "router_z": ROWS * (LENGTH - RESPONSE) + responses,
    }
