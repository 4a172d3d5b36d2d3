"""What is idle waits in the host's memory, and nothing else changes."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.experiment import ExperimentConfig, build
from hybrid_jax.training.checkpoint import Checkpoints
from hybrid_jax.training.loop import take_step
from hybrid_jax.training.offload import placed_for, with_idle, without_idle
from hybrid_jax.training.state import RunState, TrainState

SETTINGS = {
    "run_dir": "unused",
    "steps": 4,
    "model": {"name": "decoder", "num_layers": 1, "width": 8, "num_heads": 2, "max_length": 96},
    "tokenizer": {"name": "bpe", "vocab_size": 384},
    "data": {"name": "restaurants"},
    "compilation_cache": None,
    "scheduler": {"name": "alternation", "cycle": {"sft": 1, "ppo": 1}},
    "phases": {
        "sft": {"batch_size": 2, "length": 96},
        "ppo": {
            **{"prompts_per_step": 2, "max_prompt_length": 64, "epochs": 1, "sampler": {"max_new_tokens": 4}},
            "reward": {"parts": {"length": {"reward": {"name": "length", "target": 3}}}},
        },
    },
    "evaluation": {"num_prompts": 0, "num_examples": 0},
}


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_a_run_with_idle_state_on_the_host_computes_the_same_bits():
    states = {}
    for offload in ((), ("optimizer_states", "references")):
        experiment = build(parse(ExperimentConfig, {**SETTINGS, "offload": offload}))
        state, where = experiment.init(), []
        for name in ("sft", "ppo", "sft"):
            state = take_step(experiment, experiment.phases[name], state)
            where.append((kinds(state.train.opt_state["sft"]), kinds(state.train.opt_state["ppo"])))
        states[offload] = state
    assert where == [
        ({"device"}, {"pinned_host"}),
        ({"pinned_host"}, {"device"}),
        ({"device"}, {"pinned_host"}),
    ]
    assert kinds(state.references) == {"pinned_host"}
    assert kinds(state.train.params) == {"device"}
    plain, offloaded = ((s.train, dict(s.references)) for s in states.values())
    jax.tree.map(np.testing.assert_array_equal, plain, offloaded)


@pytest.mark.slow
def test_what_waits_on_the_host_is_saved_and_read_again(tmp_path):
    settings = {**SETTINGS, "run_dir": str(tmp_path), "offload": ("optimizer_states", "references")}
    experiment = build(parse(ExperimentConfig, settings))
    state = experiment.init()
    for name in ("sft", "ppo", "sft"):
        state = take_step(experiment, experiment.phases[name], state)
    assert kinds(state.references) == kinds(state.train.opt_state["ppo"]) == {"pinned_host"}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state)
    checkpoints.close()
    found = checkpoints.newest(experiment.init())
    assert found is not None
    parts = ((s.train, dict(s.references)) for s in (state, found))
    jax.tree.map(np.testing.assert_array_equal, *parts)


@dataclass
class Phase:
    optimizer_key: str
    references: tuple[str, ...] = ()


def test_a_phase_is_given_its_own_optimizer_state_alone():
    train = TrainState(params={}, opt_state={"a": {"m": jnp.ones(2)}, "b": {"m": jnp.zeros(2)}}, extra={})
    state, idle = without_idle(RunState(step=0, train=train), Phase("a"))
    assert list(state.train.opt_state) == ["a"]
    assert list(idle) == ["b"]
    assert sorted(with_idle(state, idle).train.opt_state) == ["a", "b"]


def test_nothing_moves_that_lies_where_it_shall():
    train = TrainState(params={}, opt_state={"a": {"m": jnp.ones(2)}}, extra={})
    state = RunState(step=0, train=train)
    assert (
        placed_for(state, Phase("a"), ("optimizer_states",)).train.opt_state["a"]["m"]
        is train.opt_state["a"]["m"]
    )
    assert placed_for(state, Phase("b"), ()) is state
    away = placed_for(replace(state), Phase("b"), ("optimizer_states",))
    assert kinds(away.train.opt_state) == {"pinned_host"}
