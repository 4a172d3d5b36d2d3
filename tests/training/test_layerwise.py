"""Layers in a stack are optimised like layers in a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.models.stacking import stack_layers, unstack_layers
from hybrid_jax.training.layerwise import layer_by_layer
from hybrid_jax.training.optimizers import OPTIMIZERS, Adafactor, AdamW


def layers(seed: int):
    key = jax.random.key(seed)

    def layer(i: int):
        kernel, scale = jax.random.split(jax.random.fold_in(key, i))
        scaled = (1 + i) * jax.random.normal(kernel, (6, 4))
        return {"mlp": {"kernel": scaled}, "norm": {"scale": jax.random.normal(scale, (4,))}}

    tree = {f"layer_{i}": layer(i) for i in range(4)}
    return {**tree, "token_embedding": {"embedding": jax.random.normal(key, (5, 4))}}


def two_steps(optimizer, params, gradients):
    transform = layer_by_layer(optimizer.transform())
    state, step = transform.init(params), jax.jit(transform.update)
    for _ in range(2):
        updates, state = step(gradients, state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    return params


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_stack_moves_as_its_layers_would(name):
    kind = OPTIMIZERS[name]
    settings = {"weight_decay": 0.3} if "weight_decay" in kind.__dataclass_fields__ else {}
    if kind is Adafactor:
        settings["min_factored_size"] = 2
    listed = {"model": layers(0)}, {"model": layers(1)}
    stacked = [{"model": stack_layers(tree["model"], 2)} for tree in listed]
    expected, got = two_steps(kind(**settings), *listed), two_steps(kind(**settings), *stacked)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        expected,
        {"model": unstack_layers(got["model"], 2)},
    )


def test_without_a_stack_the_state_is_the_optimizers_own():
    transform = AdamW().transform()
    params = {"layer_0": {"kernel": jnp.ones((2, 2))}}
    assert jax.tree.structure(layer_by_layer(transform).init(params)) == jax.tree.structure(
        transform.init(params)
    )
