"""The search for a mesh and its settings, on plans that a formula makes."""

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.planning.accelerators import GIB, Accelerator
from hybrid_jax.planning.plan import PhasePlan, Plan
from hybrid_jax.planning.program_cost import Cost, ProgramCost
from hybrid_jax.planning.search import meshes, render_search, search
from hybrid_jax.planning.step import Memory, Step
from hybrid_jax.planning.topology import Topology

CHIP = Accelerator("toy", 10 * GIB, peak_flops=1e12, memory_bandwidth=1e12, interconnect_bandwidth=1e12)
TOPOLOGY = Topology("toy:4", (None,) * 4, CHIP)
CURRENT = {
    "model.execution.remat": "named",
    "phases.sft.microbatches": "3",
    "phases.ppo.microbatches": "1",
    "phases.ppo.rollout_weights": "tensor",
}
FLOPS = {"none": 1e12, "dots": 1.2e12, "full": 1.5e12}
SAVED = {"none": 16, "dots": 8, "full": 4}


def make(settings, weights=8):
    """SFT keeps weights/fsdp and what the remat policy saves; a rollout the whole weights, or its part."""
    values = dict(settings)
    fsdp, data = int(values["mesh.fsdp"]), int(values["mesh.data"])
    policy, parts = values["model.execution.remat"], int(values["phases.sft.microbatches"])
    if int(values["mesh.tensor"]) > 2:
        raise UserError("heads must be divided by mesh.tensor")
    rollout = weights / fsdp if values["phases.ppo.rollout_weights"] == "fsdp" else weights
    sent = {"all-gather": 1e12 * (fsdp - 1)}
    learn = Step("sft/update", 1000, 0, memory=memory(weights / fsdp + SAVED[policy] / parts))
    learn = replaced(learn, FLOPS[policy] / (fsdp * data), sent)
    sample = replaced(Step("ppo/sample", 1000, 0, memory=memory(rollout)), 1e12, {})
    phases = PhasePlan("sft", (learn,), 1000, None), PhasePlan("ppo", (sample,), 1000, None)
    return Plan(TOPOLOGY, {"data": data, "fsdp": fsdp, "tensor": 1}, phases)


def memory(gibs):
    return Memory(arguments=gibs * GIB, temporaries=0, outputs=0, aliases=0)


def replaced(step, flops, sent):
    return Step(step.name, step.tokens, 0, memory=step.memory, cost=ProgramCost(Cost(flops, 0, sent)))


def test_every_mesh_comes_once_and_the_pure_ones_first():
    found = [(mesh["data"], mesh["fsdp"], mesh["tensor"]) for mesh in meshes(8)]
    assert found[:2] == [(1, 8, 1), (8, 1, 1)]
    assert len(found) == len(set(found)) == 10  # ordered factorisations of 8 into three
    assert all(data * fsdp * tensor == 8 for data, fsdp, tensor in found)
    assert max(mesh["tensor"] for mesh in meshes(64)) == 8


def test_a_mesh_is_tried_again_with_less_memory_until_it_fits():
    trials = search(4, CURRENT, make, limit=3)
    # All fsdp keeps 8/4 = 2 GiB of weights: 2 + 16 do not fit, 2 + 8 do. The settings of the config come last.
    tried = {trial.overrides: trial.problem for trial in trials}
    first = "mesh.data=1 mesh.fsdp=4 mesh.tensor=1 model.execution.remat={} phases.sft.microbatches=1 "
    rest = "phases.ppo.microbatches=1 phases.ppo.rollout_weights=tensor"
    assert tried[first.format("none") + rest] == "sft/update needs 18.00 GiB of 10.00 GiB"
    assert tried[first.format("dots") + rest] is None


def test_what_fits_is_ranked_by_predicted_speed():
    trials = search(4, CURRENT, make, limit=50)
    fitting = [trial for trial in trials if trial.problem is None]
    assert [trial.speed for trial in trials] == sorted((trial.speed for trial in trials), reverse=True)
    # All data: 8 GiB of weights; full remat needs 12, in two microbatches 10. It sends nothing: 1.5/4 + 1 s.
    assert dict(fitting[0].settings)["mesh.data"] == "4"
    assert dict(fitting[0].settings)["phases.sft.microbatches"] == "2"
    assert fitting[0].speed == pytest.approx(2000 / (1.5 / 4 + 1))
    refused = [trial.problem for trial in trials if dict(trial.settings)["mesh.tensor"] == "4"]
    assert refused == ["heads must be divided by mesh.tensor"]
    assert "best: mesh.data=4 mesh.fsdp=1" in render_search(trials, 50)


def test_a_rollout_that_does_not_fit_gets_its_part_of_the_weights():
    def large(settings):
        return make(settings, weights=24)

    trials = search(4, CURRENT, large, limit=50)
    best = dict(trials[0].settings)
    assert trials[0].problem is None
    assert best["phases.ppo.rollout_weights"] == "fsdp"
    assert best["mesh.fsdp"] == "4"


def test_where_nothing_fits_that_is_the_result():
    trials = search(4, CURRENT, lambda settings: make(settings, weights=99), limit=20)
    assert all(trial.problem for trial in trials)
    assert render_search(trials, 20).endswith("best: none fits; take more chips or a smaller model")


def test_no_more_plans_are_made_than_allowed():
    made = []
    search(4, CURRENT, lambda settings: made.append(settings) or make(settings), limit=4)
    assert len(made) == 4
