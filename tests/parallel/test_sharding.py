"""One program on one device and on eight: the same losses, gradients, samples and metrics."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import ExperimentConfig, build, plan_phases
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.folders.hf import load_pretrained, save_pretrained
from hybrid_jax.models.param_axes import param_axes
from hybrid_jax.parallel.mesh import MeshConfig, fetch_rows, put_rows, rows_here
from hybrid_jax.parallel.rules import ROLLOUTS, TRAINING, path_of, shard, under
from hybrid_jax.training.loop import take_step

MODEL = {
    **{"name": "decoder", "num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "max_length": 96},
    **{"position": "rotary", "norm": "rms", "mlp": "gated", "mlp_width": 24, "tie_embeddings": False},
}
SETTINGS = {
    "run_dir": "unused",
    "steps": 4,
    "model": MODEL,
    "tokenizer": {"name": "bpe", "vocab_size": 384},
    "data": {"name": "restaurants"},
    "compilation_cache": None,
    "scheduler": {"name": "alternation", "cycle": {"sft": 1, "ppo": 1}},
    "phases": {
        "sft": {"batch_size": 16, "length": 96, "microbatches": 2, "packing": False},
        "ppo": {
            **{"prompts_per_step": 16, "max_prompt_length": 64, "epochs": 1, "minibatches": 2},
            "sampler": {"max_new_tokens": 6},
            "reward": {"parts": {"length": {"reward": {"name": "length", "target": 3}, "normalise": True}}},
        },
    },
    "evaluation": {"num_prompts": 0, "num_examples": 0},
}
EVERY_AXIS = {"data": 2, "fsdp": 2, "tensor": 2}


def settings(mesh, **changes):
    model = {**MODEL, **changes.pop("model", {})}
    phases = {**SETTINGS["phases"], **changes.pop("phases", {})}
    return {**SETTINGS, "mesh": mesh, "model": model, "phases": phases, **changes}


def drawn(experiment, state):
    """What the rollout of a fresh policy samples."""
    rollouts = experiment.phases["ppo"].rollouts
    _, prompts = rollouts._prompt_batch(0)
    return rollouts._sample(state.base, state.train.params["model"], *prompts, jax.random.key(3))


def trained(mesh, **changes):
    """What a rollout samples at first; metrics and parameters after a step of SFT and one of PPO."""
    experiment = build(parse(ExperimentConfig, settings(mesh, **changes)))
    state, metrics = experiment.init(), {}
    samples = drawn(experiment, state)
    for phase in ("sft", "ppo"):
        number = jax.random.fold_in(experiment.key, state.step)
        state, numbers = experiment.phases[phase].step(state, number)
        metrics |= {n: float(v) for n, v in numbers.items() if "seconds" not in n}
    params = {**state.train.params, "model": experiment.model.listed(state.train.params["model"])}
    return SimpleNamespace(samples=samples, metrics=metrics, params=params)


@pytest.fixture(scope="module")
def alone():
    return trained({"data": 1})


@pytest.fixture(scope="module")
def many():
    """The same on eight devices and every axis, with the layers in a scan."""
    return trained(EVERY_AXIS, model={"execution": {"scan_layers": True, "remat": "full"}})


def check_same(alone, many):
    for name, number in alone.metrics.items():
        assert many.metrics[name] == pytest.approx(number, rel=1e-5, abs=2e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), alone.params, many.params)


def test_every_axis_of_a_mesh_gives_the_parameters_and_metrics_of_one_device(alone, many):
    check_same(alone, many)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "tensor": 4}])
def test_every_mesh_gives_the_parameters_and_metrics_of_one_device(alone, mesh):
    check_same(alone, trained(mesh))


def check_drawn(alone, many):
    assert len(many.tokens.sharding.device_set) == 8
    np.testing.assert_array_equal(alone.tokens, many.tokens)
    np.testing.assert_allclose(alone.log_probs, many.log_probs, atol=1e-5)


def test_the_samples_of_a_rollout_on_a_mesh_are_those_of_one_device(alone, many):
    check_drawn(alone.samples, many.samples)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ROLLOUTS)
def test_however_the_weights_of_a_rollout_lie_the_samples_are_those_of_one_device(alone, weights):
    ppo = {**SETTINGS["phases"]["ppo"], "rollout_weights": weights}
    experiment = build(parse(ExperimentConfig, settings(EVERY_AXIS, phases={"ppo": ppo})))
    check_drawn(alone.samples, drawn(experiment, experiment.init()))


def test_a_step_compiles_once_on_a_mesh():
    experiment = build(parse(ExperimentConfig, settings({"fsdp": 4, "tensor": 2}, model={"num_layers": 1})))
    state = experiment.init()
    for _ in range(2):
        state = take_step(experiment, experiment.phases["sft"], state)
    assert experiment.phases["sft"]._update._cache_size() == 1


def test_no_large_parameter_moment_or_cache_leaf_is_left_whole():
    config = parse(ExperimentConfig, settings({"fsdp": 4, "tensor": 2}, model={"width": 128, "mlp_width": 512}))
    _, state = plan_phases(config)
    table = []
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.train, dict(state.references))):
        part = np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size
        table.append((path_of(path), leaf.shape, leaf.sharding.spec, part))
    print(*table, sep="\n")
    large = [row for row in table if np.prod(row[1]) >= 1024]
    assert len(large) > 60
    assert [row for row in large if row[3] > 1 / 4] == []
    kernels = [row for row in large if row[0].endswith("mlp/up/kernel")]
    assert {(row[2], row[3]) for row in kernels} == {(P("fsdp", "tensor"), 1 / 8)}

    placement = config.mesh.placement()
    model = config.model.build(256)
    cache = jax.jit(under(placement, lambda: model.init_cache(8, 64)))()
    assert cache.keys[0].sharding.spec == P("fsdp", "tensor")


def test_a_folder_is_read_into_shards_and_no_device_gets_the_whole(tmp_path):
    model = DecoderConfig(
        num_layers=2, width=32, num_heads=4, norm="rms", mlp="gated", position="rotary"
    ).build(64)
    params = model.init(jax.random.key(0))
    save_pretrained(tmp_path, model, params)
    placement = MeshConfig(fsdp=8).placement()
    asked = []

    def sharding(path, shape):
        where = placement.sharding(shape, param_axes(path, shape))
        asked.append((path, where.shard_shape(shape)))
        return where

    _, read = load_pretrained(tmp_path, sharding=sharding)
    jax.tree.map(np.testing.assert_array_equal, params, read)
    assert dict(asked)["layer_0/mlp/up/kernel"] == (4, 128)
    assert read["layer_0"]["mlp"]["up"]["kernel"].sharding.spec == P("fsdp")


def test_rows_that_the_mesh_cannot_split_evenly_are_one_clear_line():
    phases = {"sft": {"batch_size": 12, "length": 96}}
    with pytest.raises(UserError, match=r"phases.sft: batch_size / microbatches must be a multiple of the 8"):
        build(parse(ExperimentConfig, settings({"fsdp": 8}, phases=phases)))


def test_a_mesh_larger_than_the_machine_is_one_clear_line():
    with pytest.raises(UserError, match=r"mesh 2 × 4 × 2 needs 16 devices, got 8"):
        MeshConfig(2, 4, 2).placement()


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    placement = MeshConfig(fsdp=4, tensor=2).placement()
    assert placement.sharding((50257, 64), ("vocab", "embed")).spec == P(None, "fsdp")
    assert placement.sharding((50257, 30), ("vocab", "embed")).spec == P()
    assert TRAINING.spec(placement.mesh, (8, 8), ("embed", "embed")) == P("fsdp")  # an axis serves once


def test_without_a_mesh_nothing_is_constrained():
    assert str(jax.make_jaxpr(lambda x: shard(x, "batch", "width"))(jnp.ones((4, 4)))).count("sharding") == 0


def test_rows_come_back_as_they_were_put():
    placement = MeshConfig(data=2, fsdp=2, tensor=2).placement()
    rows = np.arange(24).reshape(8, 3)
    there = put_rows(placement, rows)
    np.testing.assert_array_equal(fetch_rows(there), rows)
    np.testing.assert_array_equal(rows_here(there), np.arange(8))
