"""What an optimizer does with each parameter of every family: by what it is, not by how many axes it has."""

import jax
import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from hybrid_jax.models.decoder import Decoder
from hybrid_jax.models.families import FAMILIES
from hybrid_jax.models.families.family import parameter_shapes, unflatten
from hybrid_jax.training.muon import muon_or_adam
from hybrid_jax.training.optimizers import AdamW, Muon

MAPS = {"query", "key", "value", "output", "up", "gate", "down", "router", "shared_gate"}
EXPERTS = {"expert_up", "expert_gate", "expert_down"}
WORDS = {"token_embedding", "position_embedding", "embedding_in", "embedding_out", "lm_head"}


@pytest.fixture(scope="module")
def leaves(cases):
    """The shape of each kind of parameter, "module/leaf", wherever it has most axes."""
    found = {}
    for case, settings in cases.items():
        family = FAMILIES[case.split()[0]]
        config = family.read_config(CONFIG_MAPPING[case.split()[0]](**settings).to_dict())
        for path, shape in parameter_shapes(Decoder(config)).items():
            name = "/".join(path.split("/")[-2:])
            found[name] = max(found.get(name, ()), shape.shape, key=len)
    return found


def test_weight_decay_takes_matrices_and_embeddings_and_no_bias_scale_or_sink(leaves):
    params = unflatten({name: np.ones(shape) for name, shape in leaves.items()})
    transform = AdamW(weight_decay=1.0).transform()
    step = jax.jit(lambda gradients, params: transform.update(gradients, transform.init(params), params)[0])
    updates = step(jax.tree.map(np.zeros_like, params), params)
    decayed = {f"{m}/{leaf}" for m, part in updates.items() for leaf, x in part.items() if np.any(x)}
    kernels = {f"{module}/kernel" for module in MAPS | EXPERTS | {"embedding_in", "embedding_out", "lm_head"}}
    assert decayed == kernels | {"token_embedding/embedding", "position_embedding/embedding"}
    # These have two axes, and are vectors of each expert or head.
    many_axes = {name for name, shape in leaves.items() if len(shape) > 1 and name not in decayed}
    assert many_axes == {f"{m}/bias" for m in EXPERTS} | {
        "query_norm/scale",
        "key_norm/scale",
    }


def test_muon_takes_linear_maps_those_of_experts_too_and_nothing_else(leaves):
    params = unflatten({name: np.ones(shape) for name, shape in leaves.items()})
    labels = muon_or_adam({"layer_0": params, "score": {"kernel": np.ones((4, 2))}})
    assert labels["score"] == {"kernel": "adam"}  # of a classifier: its columns are labels
    taken = {f"{m}/{leaf}" for m, part in labels["layer_0"].items() for leaf, x in part.items() if x == "muon"}
    assert taken == {f"{module}/kernel" for module in MAPS | EXPERTS}


def test_muon_moves_each_expert_as_it_would_alone():
    gradients = {"expert_up": {"kernel": jax.random.normal(jax.random.key(0), (3, 4, 6))}}
    transform = Muon(weight_decay=0.0).transform()
    step = jax.jit(lambda gradients: transform.update(gradients, transform.init(gradients), gradients)[0])
    updates = step(gradients)
    for expert in range(3):
        moved = step({"up": {"kernel": gradients["expert_up"]["kernel"][expert]}})
        np.testing.assert_allclose(updates["expert_up"]["kernel"][expert], moved["up"]["kernel"], atol=1e-5)
        singular = np.linalg.svd(updates["expert_up"]["kernel"][expert], compute_uv=False)
        assert ((singular / (0.2 * 6**0.5) > 0.6) & (singular / (0.2 * 6**0.5) < 1.3)).all()
