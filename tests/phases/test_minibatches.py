"""Minibatches in which no row counts take no step and add nothing to the metrics."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.arrays import Sum
from hybrid_jax.phases.minibatches import update_in_minibatches
from hybrid_jax.training.optimizers import Adam, Constant
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective

OPTIMIZER = Adam(learning_rate=0.1, schedule=Constant(), max_grad_norm=None)
OBJECTIVE = Objective(
    lambda params, batch, key: (
        {"loss": Sum.of(3.0 * params["model"]["w"] * batch[0]["x"], batch[0]["counts"])},
        {"accuracy": Sum.of(batch[0]["x"], batch[0]["counts"])},
    ),
    lambda batch: {"loss": batch[0]["counts"].sum()},
    {"loss": 1.0},
)


def learned(counts, minibatches):
    config = SimpleNamespace(epochs=2, minibatches=minibatches, microbatches=1, optimizer=OPTIMIZER)
    params = {"model": {"w": jnp.float32(1.0)}}
    state = TrainState(params, {"rl": {"model": OPTIMIZER.transform().init(params["model"])}}, {})
    rows = {"x": jnp.ones(len(counts)), "counts": jnp.asarray(counts)}
    inputs = config, OBJECTIVE, state, rows, None, jax.random.key(0), 0.1
    new, means, _ = update_in_minibatches(*inputs, groups=("model",), optimizer_key="rl", model=None)  # type: ignore
    return float(new.params["model"]["w"]), means


def test_a_minibatch_without_a_row_that_counts_takes_no_step_and_no_part_in_the_means():
    w, means = learned([True, True, *[False] * 6], minibatches=8)
    assert int(means["updates"]) == 2 * 2
    assert float(means["accuracy"]) == 1.0
    # The gradient is 3 in each step, so that each step of Adam is one learning rate.
    np.testing.assert_allclose(w, 1.0 - 4 * 0.1, rtol=1e-5)


def test_where_no_row_counts_nothing_moves():
    w, means = learned([False] * 4, minibatches=2)
    assert (w, int(means["updates"]), float(means["accuracy"])) == (1.0, 0, 0.0)
