"""Rollouts one step ahead: the schedule that they claim, to the bit, resumed or not."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax.algorithms.aggregation import Correction
from hybrid_jax.core.batches import Samples
from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.loop import take_step, train

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "resume.yaml"
SETTINGS = [
    "compilation_cache=null",
    "evaluation={num_prompts: 0, num_examples: 0}",
    "steps=4",
    "checkpoint={every: 2, keep: 4}",
    "phases.ppo.value_network=shared",
    "phases.ppo.sft_mix=null",
]
PPO_ALONE = "scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 0, ppo: 1}}"
WITH_SFT = "scheduler={name: alternation, warmup: {sft: 0}, cycle: {ppo: 2, sft: 1}}"
AHEAD = "phases.ppo.rollout_ahead=true"


def experiment(folder, *overrides):
    return build(load_config(CONFIG, [f"run_dir={folder}", *SETTINGS, *overrides]))


def bits(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def run(built, monkeypatch, steps):
    """The state after some steps, and the metrics of each that PPO took."""
    phase, metrics, state = built.phases["ppo"], [], built.init()
    step = phase.step

    def recorded(state, key):
        state, numbers = step(state, key)
        metrics.append({name: float(number) for name, number in numbers.items()})
        return state, numbers

    monkeypatch.setattr(phase, "step", recorded)
    for _ in range(steps):
        state = take_step(built, built.phases[built.scheduler.choose(state.schedule)], state)
    return state, metrics


def test_each_step_learns_from_the_policy_before_the_last_update(tmp_path, monkeypatch):
    """The oracle takes the steps of plain PPO, but is handed responses that it sampled a step earlier."""
    state, metrics = run(experiment(tmp_path / "ahead", PPO_ALONE, AHEAD), monkeypatch, 4)
    plain = experiment(tmp_path / "plain", PPO_ALONE)
    phase, oracle, waiting = plain.phases["ppo"], plain.init(), None
    sample, rows = phase.rollouts._sample, phase.config.prompts_per_step
    for t in range(4):
        sample_key, _ = jax.random.split(jax.random.fold_in(plain.key, np.uint32(t)))
        now_key, next_key = jax.random.split(sample_key)

        def answers(step, key, params=oracle.train.params["model"]):
            batch = phase.rollouts.prompts.batch(step * rows, rows)
            return jax.device_get(sample({}, params, batch.tokens, batch.mask, key))

        present = answers(t, now_key) if waiting is None else waiting
        waiting = answers(t + 1, next_key)
        monkeypatch.setattr(phase.rollouts, "_sample", lambda *_, present=present: jax.device_put(present))
        oracle = take_step(plain, phase, oracle)
    assert bits(state.train.params) == bits(oracle.train.params)
    assert bits(state.train.opt_state) == bits(oracle.train.opt_state)
    assert state.cursors == {**oracle.cursors, "ppo/ahead": oracle.cursors["ppo"]}
    assert bits(state.host) == bits(oracle.host)
    stale = [numbers["ppo/staleness"] for numbers in metrics]
    assert stale == [0, 1, 1, 1]
    ratios = [abs(numbers["ppo/first_ratio"] - 1) for numbers in metrics]
    assert ratios[0] < 1e-5 < 1e-4 < min(ratios[1:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "sequence_mask"])
def test_a_correction_weighs_the_tokens_of_the_policy_before_and_ratios_start_at_one(
    tmp_path, monkeypatch, kind
):
    correction = f"phases.ppo.correction={{kind: {kind}, cap: 1.5}}"
    built = experiment(tmp_path, PPO_ALONE, AHEAD, correction)
    weighed, corrected = [], Correction.__call__

    def seen(self, log_probs, behaviour, mask):
        factors = corrected(self, log_probs, behaviour, mask)
        jax.debug.callback(
            lambda *arrays: weighed.append([*map(np.asarray, arrays)]), log_probs, behaviour, mask, factors
        )
        return factors

    monkeypatch.setattr(Correction, "__call__", seen)
    state, metrics = run(built, monkeypatch, 3)
    jax.block_until_ready(state.train)
    jax.effects_barrier()
    assert [numbers["ppo/staleness"] for numbers in metrics] == [0, 1, 1]
    assert [numbers["ppo/first_ratio"] for numbers in metrics] == pytest.approx([1.0] * 3, abs=1e-5)
    for numbers, (now, before, mask, factors) in zip(metrics, weighed, strict=True):
        ratios = np.exp(np.where(mask, now.astype(np.float64) - before, 0.0))
        if kind == "sequence_mask":
            ratios = np.broadcast_to(ratios.prod(axis=1, keepdims=True), ratios.shape)
            expected = np.where(mask & (ratios <= 1.5), ratios, 0.0)
        else:
            expected = np.where(mask, np.minimum(ratios, 1.5), 0.0)
        np.testing.assert_allclose(factors, expected, rtol=1e-5)
        assert numbers["ppo/correction"] == pytest.approx(expected[mask].mean(), rel=1e-5)
    apart = [abs(numbers["ppo/correction"] - 1) for numbers in metrics]
    assert apart[0] < 1e-5 < 1e-4 < min(apart[1:])


@pytest.mark.slow
def test_after_another_phase_the_prompts_are_answered_anew(tmp_path, monkeypatch):
    state, metrics = run(experiment(tmp_path, WITH_SFT, AHEAD), monkeypatch, 5)  # ppo ppo sft ppo ppo
    assert [numbers["ppo/staleness"] for numbers in metrics] == [0, 1, 0, 1]
    assert metrics[2]["ppo/first_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert state.cursors["ppo"] == 4 * 8  # none is left out


@pytest.mark.parametrize(
    ("scheduler", "sampled"),
    [
        ("{name: alternation, warmup: {sft: 0}, cycle: {ppo: 1, sft: 1}}", [1, 1]),  # ppo sft ppo sft
        ("{name: alternation, warmup: {sft: 0}, cycle: {ppo: 3, sft: 1}}", [2, 1, 0]),  # ppo ppo ppo sft
        (
            "{name: triggered, first: sft, second: ppo, metric: ppo/kl, above: 1e9, before: 0.5, after: 1.0}",
            [2, 2],
        ),  # who knows
    ],
)
def test_nothing_is_sampled_ahead_where_another_phase_comes_next(tmp_path, monkeypatch, scheduler, sampled):
    """By alternation 1:1 every rollout was sampled twice, and thrown away once."""
    built = experiment(tmp_path, f"scheduler={scheduler}", AHEAD)
    phase, counts = built.phases["ppo"], []
    fake = Samples.empty(phase.config.rows, phase.config.sampler.max_new_tokens)
    monkeypatch.setattr(phase.rollouts, "_sample", lambda *_: counts.append(1) or fake)
    state = built.init()
    for _ in range(4):
        if built.scheduler.choose(state.schedule) == "ppo":
            before, cursor = len(counts), state.cursors.get("ppo", 0)
            rollouts = phase.rollouts
            _, following = rollouts._answers(state, cursor, rollouts._prompt_batch(cursor)[1], built.key)
            assert len(counts) - before == sampled.pop(0)
            cursors = {"ppo": cursor + phase.config.prompts_per_step}
            cursors |= {} if following is None else rollouts._ahead.cursor(cursors["ppo"])
            state = replace(state, cursors={**state.cursors, **cursors})
        chosen = built.scheduler.choose(state.schedule)
        state = replace(state, schedule=built.scheduler.update(state.schedule, chosen, {}))
    assert sampled == []


def test_a_resumed_run_goes_on_with_the_responses_that_were_sampled_ahead(tmp_path):
    whole = train(experiment(tmp_path, PPO_ALONE, AHEAD))
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    resumed = train(experiment(tmp_path, PPO_ALONE, AHEAD))
    assert resumed.step == whole.step == 4
    assert bits(resumed.train) == bits(whole.train)
    assert bits(resumed.host) == bits(whole.host)


@pytest.mark.slow
def test_a_step_does_not_wait_for_the_one_before(tmp_path):
    """Metrics are read a step late, so that the host rewards while the device still updates."""
    assert experiment(tmp_path).phases["ppo"].waits_for_device
    assert not experiment(tmp_path, AHEAD).phases["ppo"].waits_for_device
