"""Slices of TPUs by name; programs compiled for them where their compiler is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import ExperimentConfig, plan_phases
from hybrid_jax.parallel.mesh import MeshConfig
from hybrid_jax.planning.search import meshes
from hybrid_jax.planning.step import compile_step
from hybrid_jax.planning.topology import find_topology
from hybrid_jax.training.phase import Program

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v5e", "topology v5e must have 2 axes of chips, as in v5e:4x4, got 'v5e'"),
        ("v5e:4x4x4", "topology v5e must have 2 axes of chips, as in v5e:4x4, got 'v5e:4x4x4'"),
        ("v5p:4x4", "topology v5p must have 3 axes of chips, as in v5p:4x4x4, got 'v5p:4x4'"),
        ("v5e:32x32", "topology v5e must be at most 16x16 chips, got 'v5e:32x32'"),
        ("v5e:0x4", "topology v5e must have 2 axes of chips, as in v5e:4x4, got 'v5e:0x4'"),
        (
            "v5x:4x4",
            "topology must be local or <TPU>:<chips>, as in v5e:4x4, got 'v5x:4x4'; did you mean 'v5p'?",
        ),
        ("gpu", "topology must be local or <TPU>:<chips>, as in v5e:4x4, got 'gpu'; known: local, tpu7x, v4"),
    ],
)
def test_an_impossible_slice_is_one_clear_line(name, line):
    with pytest.raises(UserError) as error:
        find_topology(name)
    assert str(error.value).startswith(line)


@needs_libtpu
def test_a_slice_that_hosts_cannot_make_up_is_one_clear_line():
    with pytest.raises(UserError, match=r"^topology 'v5e:3x3' is impossible: .*not divisible"):
        find_topology("v5e:3x3")


def test_without_the_compiler_of_tpus_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tpu\]'"):
        find_topology("v5e:4x4")


def test_local_is_what_is_here(monkeypatch):
    monkeypatch.setattr("hybrid_jax.planning.topology.local_accelerator", lambda devices: None)
    here = find_topology("local")
    assert (here.devices, here.platform, here.chips) == (tuple(jax.devices()), "cpu", len(jax.devices()))


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "chips", "accelerator"),
    [
        ("v5e:1x1", 1, 1, "v5e"),
        ("v5e:2x4", 8, 8, "v5e"),
        ("v5e:16x16", 256, 256, "v5e"),
        ("v4:2x2x2", 8, 8, "v4"),
        ("v5p:8x8x16", 1024, 1024, "v5p"),
        ("tpu7x:2x2x1", 8, 4, "tpu7x"),
    ],
)
def test_a_slice_has_its_devices_without_any_hardware(name, devices, chips, accelerator):
    found = find_topology(name)
    assert (len(found.devices), found.chips, found.platform) == (devices, chips, "tpu")
    assert found.accelerator is not None
    assert found.accelerator.name == accelerator


@needs_libtpu
def test_a_program_for_a_slice_has_costs_that_are_counted_by_hand():
    layers, rows, width, inner, count = 5, 1024, 256, 512, 4
    mesh = Mesh(np.array(find_topology("v5e:2x2").devices), ("fsdp",))

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def loss(w, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return (lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2).sum()

    weights = (array((layers, width, inner), None, "fsdp"), array((layers, inner, width), None, "fsdp"))
    gradient = jax.jit(jax.grad(loss), out_shardings=tuple(w.sharding for w in weights))
    program = Program("sft/update", gradient, (weights, array((count * rows, width), "fsdp")))
    step = compile_step(program, "tpu")
    assert step.cost is not None
    assert step.memory is not None
    cost, weight_bytes = step.cost.total, 2 * 2 * layers * width * inner
    # Forward two products, backward four, less the gradient of the first layer's input (which XLA may keep).
    assert cost.flops == 6 * layers * 2 * rows * width * inner
    # Each weight is gathered before it is read, forward and again backward; each gradient is scattered.
    assert cost.collectives["all-gather"] == 2 * 3 / 4 * weight_bytes
    assert cost.collectives["reduce-scatter"] == 3 / 4 * weight_bytes
    assert step.memory.arguments == weight_bytes / 4 + 2 * rows * width


@needs_libtpu
def test_a_program_that_no_chip_can_hold_is_refused_with_numbers():
    device = NamedSharding(Mesh(np.array(find_topology("v5e:1x1").devices), ("d",)), P())
    large = jax.ShapeDtypeStruct((2**30, 8), jnp.float32, sharding=device)
    step = compile_step(Program("sft/update", jax.jit(lambda x: x.sum()), (large,)), "tpu")
    assert step.problem is not None
    assert step.problem.endswith("of 15.75 GiB")
    assert step.refused is not None
    assert step.refused >= 32 * 2**30


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("2xv5x:4x4", "topology must be local or <TPU>:<chips>, as in v5e:4x4, got '2xv5x:4x4'; did you mean"),
        ("2xlocal", "topology must be local or <TPU>:<chips>, as in v5e:4x4, got '2xlocal'; did you mean"),
        ("0xv5e:4x4", "topology must be local or <TPU>:<chips>, as in v5e:4x4, got '0xv5e:4x4'; did you mean"),
        ("9999xv5e:4x4", "topology must have at most 256 slices, got 9999 in '9999xv5e:4x4'"),
        ("2xv5p:4x4", "topology v5p must have 3 axes of chips, as in v5p:4x4x4, got '2xv5p:4x4'"),
    ],
)
def test_impossible_slices_are_one_clear_line(name, line):
    with pytest.raises(UserError) as error:
        find_topology(name)
    assert str(error.value).startswith(line)


GENERATIONS = {
    "v4": ("2x2x4", "4x4x4", "4x8x8"),
    "v5p": ("2x2x4", "4x4x4", "4x8x8"),
    "v5e": ("4x4", "8x8", "16x16"),
    "v6e": ("4x4", "8x8", "16x16"),
    "tpu7x": ("2x2x4", "4x4x4", "4x8x8"),
}


@needs_libtpu
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_every_mesh_of_the_search_builds_on_what_libtpu_describes(kind, slices):
    for shape in GENERATIONS[kind]:
        found = find_topology(f"{slices}x{kind}:{shape}")
        assert found.slices == slices
        for mesh in meshes(len(found.devices)):
            arranged = MeshConfig(**mesh).placement(found.devices).mesh.devices
            assert len(set(arranged.flat)) == len(found.devices)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("v4:2x2x1", {"data": 2, "fsdp": 2}),
        ("v5e:2x2", {"fsdp": 2, "tensor": 2}),
        ("v5p:2x2x1", {"data": 2, "tensor": 2}),
        ("v6e:2x4", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tpu7x:2x2x1", {"data": 2, "fsdp": 4}),
        ("2xv4:2x2x1", {"data": 2, "fsdp": 4}),
        ("2xv5e:2x2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("2xv5e:2x2", {"fsdp": 8}),  # parameters over both slices
        ("2xv5p:2x2x1", {"data": 4, "fsdp": 2}),
        ("2xv6e:2x2", {"data": 8}),
        ("2xtpu7x:2x2x1", {"data": 2, "fsdp": 8}),
    ],
)
def test_a_step_compiles_for_every_generation_and_for_two_slices(name, mesh):
    model = {"name": "decoder", "num_layers": 2, "width": 256, "num_heads": 4, "max_length": 128}
    settings = {
        "run_dir": "unused",
        "steps": 1,
        "mesh": mesh,
        "model": {**model, "position": "rotary", "vocab_size": 512, "dtype": "bfloat16"},
        "tokenizer": "bytes",
        "data": {"name": "jsonl", "train": "there/is/no/such/file.jsonl"},
        "phases": {"sft": {"batch_size": 16, "length": 128}},
        "scheduler": {"name": "alternation", "cycle": {"sft": 1}},
    }
    found = find_topology(name)
    phases, state = plan_phases(parse(ExperimentConfig, settings), found.devices)
    step = compile_step(phases["sft"].programs(state)[0], "tpu")
    assert step.problem is None
    assert step.cost is not None
    total = step.cost.total
    assert total.flops > 0
    assert (total.between_slices > 0) == (found.slices == 2)


@needs_libtpu
def test_bytes_between_slices_are_counted_by_hand():
    placement = MeshConfig(data=2, fsdp=4).placement(find_topology("2xv5e:2x2").devices)
    size = 2048

    def array(dtype, *spec):
        return jax.ShapeDtypeStruct((size, size), dtype, sharding=NamedSharding(placement.mesh, P(*spec)))

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w).astype(jnp.float32)))(w)

    weight = array(jnp.bfloat16, "fsdp")
    function = jax.jit(gradient, out_shardings=weight.sharding)
    step = compile_step(Program("sft/update", function, (weight, array(jnp.bfloat16, ("data", "fsdp")))), "tpu")
    assert step.cost is not None
    # Each slice has the sum of its own gradients, a part on each chip; of two slices each sends its part once.
    assert step.cost.total.between_slices == 2 * size * size / 4
