"""Preferences on adapters: the reference is the base below them, and no second model is made."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_jax import build, load_config
from hybrid_jax.experiment import plan_phases
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.models.lora import merge
from hybrid_jax.phases.preference import answer_log_probs
from hybrid_jax.planning.step import compile_step

DEBUG = Path(__file__).parents[2] / "configs" / "debug"
BETA, RANK = 0.1, 2
MODEL = "name: decoder, num_layers: 1, width: 64, num_heads: 2, max_length: 48"
# query, key, value, output: 64 × 64; up 64 × 256; down 256 × 64: r (I + O) numbers each, float32
ADAPTER_BYTES = 4 * RANK * (4 * (64 + 64) + 2 * (64 + 256))


@pytest.fixture
def config(monkeypatch):
    """The config of a run of DPO, with further overrides."""
    monkeypatch.chdir(DEBUG.parents[1])
    shared = ["run_dir=/nonexistent", "phases.preference.microbatches=1", "scheduler.warmup={sft: 0}"]
    return lambda *overrides: load_config(DEBUG / "dpo.yaml", [*shared, *overrides])


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_dpo_on_adapters_has_the_numbers_of_whole_models_and_keeps_only_adapters_beside(config):
    """The oracle merges adapters into their base: once for the policy, and once for its frozen copy."""
    experiment = build(config(f"model={{{MODEL}, lora: {{rank: {RANK}}}}}"))
    plain = DecoderConfig(num_layers=1, width=64, num_heads=2, max_length=48).build(experiment.model.vocab_size)
    read = jax.jit(lambda params, rows: answer_log_probs(plain, params, rows)[0])

    def merged(state):
        return merge(experiment.config.model.lora, jax.tree.map(jnp.copy, state.policy))

    phase, state, key = experiment.phases["preference"], experiment.init(), jax.random.key(0)
    # adapters that have learnt something before: the reference is no bare base
    learnt = [0.1 * jax.random.normal(key, leaf.shape) for leaf in jax.tree.leaves(state.train.params["model"])]
    structure = jax.tree.structure(state.train.params["model"])
    params = {**state.train.params, "model": jax.tree.unflatten(structure, learnt)}
    state = replace(state, train=state.train.replace(params=params))
    reference = merged(state)
    margins = []
    for step in range(3):
        rows = phase.stream.batch(4 * step, 4)
        now, before = (np.asarray(read(params, rows), np.float64) for params in (merged(state), reference))
        margins = BETA * ((now - before)[:, 0] - (now - before)[:, 1])
        state, metrics = phase.step(state, key)
        assert float(metrics["preference/margin"]) == pytest.approx(margins.mean(), abs=1e-5)
        assert float(metrics["preference/loss"]) == pytest.approx(np.logaddexp(0, -margins).mean(), abs=1e-5)
    assert abs(margins.mean()) > 1e-3
    assert {name: size(tree) for name, tree in state.references.items()} == {"preference/start": ADAPTER_BYTES}
    assert size(state.train) == 3 * ADAPTER_BYTES + 4  # with two moments and the count of updates
    assert size(state.base) == size(plain.init(key))


@pytest.mark.slow
def test_an_update_of_adapters_needs_no_second_model(config):
    def needed(settings, *overrides):
        phases, state = plan_phases(config(f"model={{{settings}}}", "tokenizer=bytes", *overrides))
        (program,) = phases["preference"].programs(state)
        memory = compile_step(program, "cpu").memory
        return memory.arguments, memory.peak

    model, lora = f"{MODEL}, vocab_size: 259", f"{MODEL}, vocab_size: 259, lora: {{rank: {RANK}}}"
    base = size(
        DecoderConfig(num_layers=1, width=64, num_heads=2, max_length=48).build(259).init(jax.random.key(0))
    )
    online = "phases.preference.online_references=true"
    kept, asked = needed(lora), needed(lora, online)
    rows = 4 * 2 * 40 * (4 + 4 + 1) + 4 * 2 * 4
    assert kept[0] == pytest.approx(base + 3 * ADAPTER_BYTES + rows, rel=0.01)  # adapters, two moments, rows
    assert asked[0] - kept[0] == pytest.approx(ADAPTER_BYTES, rel=0.01)  # the reference's own adapters
    assert asked[1] - kept[1] < 0.5 * base
    whole = [needed(model), needed(model, online)]
    assert whole[1][0] - whole[0][0] == pytest.approx(base, rel=0.01)  # what is spared
