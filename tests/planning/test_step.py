"""Memory, rooflines and refusals of single programs."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from hybrid_jax.planning.accelerators import (
    _DEVICE_KINDS,
    GIB,
    TPUS,
    Accelerator,
    accelerator_of,
    local_accelerator,
    measured,
)
from hybrid_jax.planning.program_cost import Cost, OpenLoop, ProgramCost
from hybrid_jax.planning.step import Memory, Roofline, Step, compile_step, device_bytes, out_of_memory
from hybrid_jax.training.machine import peak_flops
from hybrid_jax.training.phase import Program

CHIP = Accelerator("toy", memory_bytes=100, peak_flops=1000, memory_bandwidth=100, interconnect_bandwidth=10)


def test_the_slowest_of_three_binds():
    roofline = Roofline.of(Cost(flops=4000, bytes=300, collectives={"all-gather": 5, "all-reduce": 15}), CHIP)
    assert (roofline.compute, roofline.memory, roofline.interconnect) == (4, 3, 2)
    assert (roofline.seconds, roofline.bound_by) == (4, "compute")
    assert Roofline.of(Cost(flops=4000, bytes=500), CHIP).bound_by == "memory"
    slow = replace(CHIP, network_bandwidth=2)
    assert Roofline.of(Cost(flops=4000, between_slices=24), slow).seconds == 24 / 2
    assert Roofline.of(Cost(flops=4000, between_slices=24), slow).bound_by == "network"
    assert Roofline.of(Cost(flops=4000, between_slices=24), CHIP).seconds == 4  # of unknown speed


def test_the_devices_of_a_chip_share_its_peaks():
    pair = Accelerator("pair", 100, 1000, 100, 10, devices=2)
    assert Roofline.of(Cost(flops=1000), pair).seconds == 2 * Roofline.of(Cost(flops=1000), CHIP).seconds


def test_sampling_takes_a_prefill_and_a_turn_for_every_token():
    decode = (OpenLoop(3, Cost(bytes=200)), OpenLoop(2, Cost(bytes=300)))
    step = Step("ppo/sample", 60, 1.0, cost=ProgramCost(Cost(flops=5000, bytes=100), decode))
    assert step.seconds(CHIP) == pytest.approx(5 + 3 * 2 + 2 * 3)  # the prefill is bound by compute
    assert step.parts()["decode"] == (Cost(bytes=pytest.approx(1200 / 5)), 5)


def test_the_memory_of_a_program_is_what_xla_allocates():
    size = 256

    @partial(jax.jit, donate_argnums=0)
    def update(w, x):
        y = jnp.tanh(x @ w)
        return w - y.T @ x, y.sum()

    shapes = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 2
    step = compile_step(Program("sft/update", update, tuple(shapes), tokens=7), "cpu")
    assert step.memory is not None
    assert step.memory.arguments == 2 * 4 * size * size
    assert step.memory.aliases == 4 * size * size
    assert step.memory.temporaries >= 4 * size * size  # y, and what is taken from w
    memory = step.memory
    assert memory.peak == memory.arguments + memory.temporaries + memory.outputs - memory.aliases
    assert (step.tokens, step.name) == (7, "sft/update")
    assert step.cost is not None
    assert step.cost.total.flops == 2 * 2 * size**3


@pytest.mark.parametrize(
    ("message", "needed", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(25.61G) exceeds available HBM (15.75G).",
            25.61 * GIB,
            "does not fit: needs 25.61 of 15.75 GiB",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 2.50T of 15.75G hbm. Exceeded hbm capacity by 2.48T.",
            2560 * GIB,
            "does not fit: needs 2560.00 of 15.75 GiB",
        ),
        ("RESOURCE_EXHAUSTED: no\nmemory", None, "does not fit: RESOURCE_EXHAUSTED: no memory"),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_there_is(message, needed, line):
    assert out_of_memory(message) == (pytest.approx(needed), line)


def test_a_program_that_is_refused_is_a_result_and_other_errors_are_not():
    class Refused:
        def __init__(self, message):
            self.message = message

        def lower(self, *arguments, **settings):
            raise RuntimeError(self.message)

    full = "RESOURCE_EXHAUSTED: the memory required for HLO temporaries (3.00G) exceeds available HBM (2.00G)"
    step = compile_step(Program("ppo/learn", Refused(full), ()), "tpu")
    assert (step.refused, step.problem) == (3 * GIB, "does not fit: needs 3.00 of 2.00 GiB")
    assert (step.peak, step.fits(CHIP), step.seconds(CHIP)) == (3 * GIB, False, None)
    with pytest.raises(RuntimeError, match="a defect"):
        compile_step(Program("ppo/learn", Refused("a defect"), ()), "tpu")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_devices_are_known_by_what_they_call_themselves(kind, name):
    found = accelerator_of(kind)
    assert found is not None
    assert found.name == name


def test_unknown_devices_have_no_peaks():
    assert accelerator_of("TPU v2") is None
    assert accelerator_of("NVIDIA H100 PCIe") is None


def test_published_peaks_give_the_known_intensities():
    """FLOPs a byte at which memory and arithmetic take the same time: 240 on a v5e, 560 on a v6e."""
    assert TPUS["v5e"].peak_flops / TPUS["v5e"].memory_bandwidth == pytest.approx(240, rel=0.01)
    assert TPUS["v6e"].peak_flops / TPUS["v6e"].memory_bandwidth == pytest.approx(560, rel=0.01)
    assert all(chip.source == "published" for chip in TPUS.values())


def test_a_cpu_is_measured_and_says_so(monkeypatch):
    cpu = measured(1)
    assert cpu.source == "measured"
    assert 1e9 < cpu.peak_flops < 1e14
    assert 1e8 < cpu.memory_bandwidth < 1e13
    monkeypatch.setattr("hybrid_jax.planning.accelerators.measured", lambda count: count)
    assert local_accelerator(jax.devices()) == len(jax.devices())


def test_what_lies_beside_a_program_must_fit_too():
    memory = Memory(arguments=50, temporaries=20, outputs=50, aliases=50)
    step = Step("sft/update", 1, 0.0, beside=30, memory=memory)
    assert (step.peak, step.fits(CHIP)) == (100, True)
    assert Step("sft/update", 1, 0.0, beside=31, memory=memory).fits(CHIP) is False
    assert step.fits(None) is None


def test_of_a_tree_a_device_holds_its_parts():
    mesh = jax.sharding.Mesh(jax.devices()[:8], ("d",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.P(*spec)) for spec in (("d",), ()))
    tree = {
        "split": jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=split),
        "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
        "host": jax.ShapeDtypeStruct((99,), jnp.float32, sharding=whole.with_memory_kind("unpinned_host")),
    }
    assert device_bytes(tree) == 2 * 3 * 4 + 5 * 2


def test_peaks_are_those_that_a_run_measures_itself_by():
    kinds = [kind for kind in _DEVICE_KINDS if kind != "TPU v5e"] + ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    for kind in kinds:
        chip = accelerator_of(kind)
        assert chip is not None
        assert peak_flops([SimpleNamespace(device_kind=kind)]) == chip.peak_flops / chip.devices


def test_a_peak_is_the_sum_of_what_lives_beside_each_other():
    assert Memory(arguments=10, temporaries=5, outputs=8, aliases=7, live=3).peak == 16
