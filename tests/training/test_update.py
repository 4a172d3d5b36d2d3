"""Gradients and the update by them are two things, so that a gradient may come from anywhere."""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_jax.core.arrays import Sum
from hybrid_jax.training.optimizers import Adam, Constant
from hybrid_jax.training.state import TrainState
from hybrid_jax.training.update import Objective, apply_gradients, gradients, update, update_state

OPTIMIZER = Adam(learning_rate=0.1, schedule=Constant(), max_grad_norm=1.0)
KEY = jax.random.key(0)
BATCH = jnp.asarray([1.0, 2.0, 3.0, 6.0])


def term(name, scale):
    """``scale · mean over rows of (x · w)``, whose gradient is ``scale · mean x = 3 · scale``."""

    def loss(params, batch, key):
        return {name: Sum(scale * (batch * params["model"]["w"]).sum(), jnp.float32(len(batch)))}, {}

    return Objective(loss, lambda batch: {name: len(batch)}, {name: 1.0})


def state():
    params = {"model": {"w": jnp.asarray(2.0)}}
    return TrainState(params, {"sft": {"model": OPTIMIZER.transform().init(params["model"])}}, {})


def test_the_sum_of_the_gradients_of_two_objectives_updates_like_their_sum():
    def both(params, batch, key):
        first, second = (term(n, s).loss(params, batch, key)[0] for n, s in (("a", 0.1), ("b", 0.2)))
        return {**first, **second}, {}

    whole = Objective(both, lambda batch: {"a": len(batch), "b": len(batch)}, {"a": 1.0, "b": 1.0})
    expected, metrics, _ = update_state(whole, OPTIMIZER, state(), BATCH, KEY, 0.5, optimizer_key="sft")
    parts = [gradients(term(n, s), state().params, BATCH, KEY) for n, s in (("a", 0.1), ("b", 0.2))]
    grads = jax.tree.map(jnp.add, parts[0][0], parts[1][0])
    means = {**parts[0][1], **parts[1][1]}
    new, found, taken = update(OPTIMIZER, state(), grads, means, 0.5, optimizer_key="sft", losses=("a", "b"))
    assert bool(taken)
    np.testing.assert_allclose(new.params["model"]["w"], expected.params["model"]["w"], rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], 0.9, rtol=1e-6)  # 3 · (0.1 + 0.2)
    np.testing.assert_allclose(metrics["grad_norm"], 0.9, rtol=1e-6)


def test_a_weight_below_1_divides_a_loss_like_any_other():
    # As the shares of a minibatch that holds a quarter of the answers to a prompt.
    def loss(params, batch, key):
        return {"a": Sum(0.25 * (batch * params["model"]["w"]).mean(), jnp.float32(0.25))}, {}

    objective = Objective(loss, lambda batch: {"a": jnp.float32(0.25)}, {"a": 1.0})
    grads, metrics = gradients(objective, state().params, BATCH, KEY)
    assert float(grads["model"]["w"]) == 3.0
    assert float(metrics["a"]) == 6.0


def test_a_gradient_from_elsewhere_that_is_not_finite_changes_nothing():
    grads = {"model": {"w": jnp.asarray(jnp.nan)}}
    new, _, taken = update(OPTIMIZER, state(), grads, {"loss": jnp.zeros(())}, 0.5, optimizer_key="sft")
    assert not taken
    assert float(new.params["model"]["w"]) == 2.0


def test_the_norm_of_several_groups_does_not_depend_on_their_names():
    # Behind 2^24 each one is lost, before it four of them are not. So the order of the sum shows.
    large, ones = {"w": jnp.asarray(2.0**12)}, {str(i): jnp.ones(()) for i in range(4)}
    norms = set()
    for name in ("a", "z"):
        params = {"model": large, name: ones}
        states = {group: OPTIMIZER.transform().init(tree) for group, tree in params.items()}
        norms.add(float(apply_gradients(OPTIMIZER, params, states, params, 0.1)[2]) ** 2)
    assert len(norms) == 1
