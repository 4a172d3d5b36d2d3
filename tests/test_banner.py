"""What a run says of itself before its first step."""

from types import SimpleNamespace

import numpy as np

from hybrid_jax.experiment import load_config
from hybrid_jax.runs.banner import banner

TRIGGERED = "scheduler={name: triggered, first: sft, second: ppo, metric: sft/loss, below: 2.0}"


def state_of(base=None, **groups):
    """Parameters by group: as many numbers as said."""
    params = {name: {"kernel": np.zeros(count, np.int8)} for name, count in groups.items()}
    return SimpleNamespace(train=SimpleNamespace(params=params), base=base or {})


def lines_of(state, *overrides, resumed_at=None):
    config = load_config("configs/debug/hybrid.yaml", ["run_dir=runs/mine", *overrides])
    rows = {"train": 6000, "held_out": 400}
    return banner(config, config.mesh.placement(), state, rows, resumed_at).splitlines()


def test_a_run_introduces_itself_in_aligned_lines():
    title, *lines = lines_of(state_of(model=29_216, value=33))
    assert title.startswith("hybrid_jax 0.")
    assert ", jax 0." in title
    assert lines == [
        "  run_dir  runs/mine, new",
        "  devices  1 × cpu (of 8)",
        "  model    decoder, 29.2 K parameters, all trained (+ value 33)",
        "  data     restaurants, 6,000 rows to learn from, 400 held out",
        "  phases   sft 6 steps, ppo 2 steps by alternation",
        "  steps    8, evaluation at each end, checkpoint every 3",
    ]


def test_it_names_the_step_it_goes_on_at_the_mesh_the_folder_and_what_an_adapter_trains():
    state = state_of({"kernel": np.zeros(1_200_000, np.int8)}, model=5_000)
    model = "model={name: pretrained, path: some/folder, lora: {rank: 2}}"
    lines = lines_of(state, "mesh={data: 2, tensor: 2}", model, "evaluation.every=2", resumed_at=4)
    assert lines[1] == "  run_dir  runs/mine, goes on at step 4"
    assert lines[2] == "  devices  4 × cpu (of 8), mesh data 2 × tensor 2"
    assert lines[3] == "  model    pretrained some/folder, 1.21 M parameters, 5 K of them trained"
    assert lines[6] == "  steps    8, evaluation every 2, checkpoint every 3"


def test_a_phase_of_another_name_is_shown_with_its_kind():
    phases = "phases={teach: {name: sft}}"
    lines = lines_of(
        state_of(model=5), phases, "scheduler={name: alternation, warmup: {teach: 1}, cycle: {teach: 1}}"
    )
    assert lines[5] == "  phases   teach (sft) 8 steps by alternation"


def test_a_scheduler_that_waits_for_a_metric_promises_no_counts():
    lines = lines_of(state_of(model=5), TRIGGERED)
    assert lines[5] == "  phases   sft, ppo by triggered, which waits for sft/loss"
