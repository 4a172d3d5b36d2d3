"""Neither microbatches, nor padding, nor the number of devices changes a gradient: prompts of many lengths."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.algorithms.aggregation import Aggregation
from hybrid_jax.algorithms.kto import KTO
from hybrid_jax.algorithms.preference_losses import IPO, ORPO, Sigmoid, SimPO
from hybrid_jax.core.batches import Rollout
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.parallel.mesh import MeshConfig, put_rows
from hybrid_jax.parallel.rules import under
from hybrid_jax.phases.answer_losses import AnswerBatch, answer_log_probs
from hybrid_jax.phases.policy_gradient_functions import PolicyGradientFunctions
from hybrid_jax.phases.preference import preference_objective
from hybrid_jax.phases.rloo import RLOO
from hybrid_jax.rewards.composite import CompositeReward, Part
from hybrid_jax.rewards.tokens import TokenCount
from hybrid_jax.sampling.ancestral import Ancestral
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import gradients

pytestmark = pytest.mark.slow
DEBUG = Path(__file__).parents[2] / "configs" / "debug"
LOSSES = {"sigmoid": Sigmoid(), "ipo": IPO(), "kto": KTO(), "simpo": SimPO(), "orpo": ORPO()}
EIGHT = MeshConfig(data=2, fsdp=4).placement()


def check_same(whole, others):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    assert scale > 1e-4
    for other in others:
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(scale, 1.0))


@pytest.fixture(scope="module")
def pairs():
    """The model of the debug config of DPO, its settings, and eight pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DEBUG.parents[1])
        experiment = build(load_config(DEBUG / "dpo.yaml", ["run_dir=/nonexistent"]))
    phase: Any = experiment.phases["preference"]
    rows = phase.stream.rows(np.arange(8))
    return experiment.model, phase.config, experiment.init().policy, rows


@pytest.mark.parametrize("name", LOSSES)
def test_of_a_loss_on_preferences(pairs, name):
    model, config, policy, rows = pairs
    config = replace(config, loss=LOSSES[name])
    objective, single = preference_objective(config, model), name == "kto"
    apart = jnp.linspace(-1.0, 1.0, 16).reshape(8, 2)
    batch: Any = AnswerBatch(
        rows,
        np.asarray(answer_log_probs(model, policy, rows)[0] + apart) if config.loss.needs_reference else None,
        np.arange(8) % 3 > 0 if single else None,
        np.full(8, 0.3, np.float32) if single else None,
    )
    longer = batch.replace(rows=jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, 8))), batch.rows))

    def of(batch, parts):
        return gradients(objective, {"model": policy}, batch, jax.random.key(0), parts)[0]

    compute = jax.jit(of, static_argnums=1)
    spread = jax.jit(under(EIGHT, of), static_argnums=1)(put_rows(EIGHT, batch), 1)
    check_same(compute(batch, 1), [compute(batch, 2), compute(batch, 4), compute(longer, 1), spread])


V, P, R = 11, 5, 6
MODEL = DecoderConfig(num_layers=1, width=8, num_heads=2, max_length=32).build(V)


def functions(**settings):
    reward = CompositeReward({"count": Part(TokenCount(weights={2: 1.0, 5: -0.7}))})
    shape: Any = {"prompts_per_step": 4, "samples_per_prompt": 2, "sampler": Ancestral(R), "reward": reward}
    return PolicyGradientFunctions(RLOO(**shape, **settings), MODEL, (3,), "rloo", "rloo")


def rollout(pad):
    """Eight answers of 1 to 6 tokens to prompts of 2 to 5, with ``pad`` more columns before them."""
    draw = np.random.default_rng(0)
    starts, ends = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([6, 1, 3, 6, 2, 5, 4, 1])
    tokens = draw.integers(0, V, (8, P + R)).astype(np.int32)
    columns, chosen = np.arange(P + R), np.arange(R) < ends[:, None]
    real = (columns >= starts[:, None]) & (columns < P + ends[:, None])
    before = ((0, 0), (pad, 0))
    numbers = [draw.normal(-2, 0.3, chosen.shape).astype(np.float32) for _ in range(2)]
    scores = draw.normal(size=8).astype(np.float32)
    return Rollout(
        tokens=np.pad(tokens, before),
        attention_mask=np.pad(real, before),
        action_mask=chosen,
        log_probs=numbers[0],
        group=np.arange(8, dtype=np.int32) // 2,
        values=None,
        reference_log_probs={"sft": numbers[1]},
        scores=scores,
        plain_scores=scores,
    )


@pytest.mark.parametrize("kind", get_args(Aggregation))
def test_of_an_aggregation(kind):
    params = {"model": jax.tree.map(lambda x: 5 * x, MODEL.init(jax.random.key(0)))}

    def of(parts, placement=None, pad=0):
        read = functions(aggregation=kind, microbatches=parts)
        state: Any = TrainState
        state = state(params=params, opt_state={}, extra={read.kl_key: read.config.kl_control.init()})

        def gradient(rows, key):
            return read.gradient(state, rows, key, groups=("model",))[0]

        rows = rollout(pad)
        if placement is None:
            return jax.jit(gradient)(rows, jax.random.key(0))
        return jax.jit(under(placement, gradient))(put_rows(placement, rows), jax.random.key(0))

    check_same(of(1), [of(2), of(4), of(1, pad=3), of(1, EIGHT)])
