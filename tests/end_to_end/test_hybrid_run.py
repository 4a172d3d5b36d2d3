"""What must hold in any run of SFT and PPO together, on the config that uses every part of the state."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax.experiment import build, load_config
from hybrid_jax.training.loop import take_step, train

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "resume.yaml"
QUIET = ["compilation_cache=null", "evaluation={num_prompts: 0, num_examples: 0}", "checkpoint.every=100"]
SFT_ALONE = "scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 1, ppo: 0}}"
PPO_ALONE = "scheduler={name: alternation, warmup: {sft: 0}, cycle: {sft: 0, ppo: 1}}"


def experiment(folder, *overrides):
    return build(load_config(CONFIG, [f"run_dir={folder}", *QUIET, *overrides]))


def bits(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def digest(tree):
    return hashlib.sha256(b"".join(bits(tree).values())).hexdigest()


def addresses(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return experiment(tmp_path_factory.mktemp("run"))


def states(built, steps):
    """The state before each step, and after the last one."""
    state = built.init()
    for _ in range(steps):
        yield state
        state = take_step(built, built.phases[built.scheduler.choose(state.schedule)], state)
    yield state


def test_every_function_compiles_once_for_each_prompt_length_and_every_update_consumes_its_state(built):
    lengths, before = set(), None
    for state in states(built, 9):  # sft sft ppo ppo sft ppo ppo sft ppo
        if before is not None:
            used = before.train.opt_state[state.schedule.last]
            leaves = jax.tree.leaves(before.train.params["model"]) + jax.tree.leaves(used)
            assert all(leaf.is_deleted() for leaf in leaves)
        if built.scheduler.choose(state.schedule) == "ppo":
            cursor = state.cursors.get("ppo", 0)
            lengths.add(built.phases["ppo"].rollouts.prompts.batch(cursor, 8).tokens.shape[1])
        before = state
    rollouts = built.phases["ppo"].rollouts
    parts = {"references": rollouts.references, "value": built.phases["ppo"]._start_value, "ppo": rollouts}
    compiled = {
        (name, attribute): function._cache_size()
        for name, part in [*built.phases.items(), *parts.items()]
        for attribute, function in vars(part).items()
        if hasattr(function, "_cache_size")
    }
    once = {("sft", "_rate"): 1, ("sft", "_update"): 1, ("ppo", "_rate"): 1}
    once |= {("references", "_copy"): 1, ("value", "_copy"): 1}
    once |= {
        ("ppo", "_reward_on_device"): 0,
        ("ppo", "_sample_opponent"): 0,
    }  # it reads texts; nobody else answers
    assert compiled == once | {("ppo", f): len(lengths) for f in ("_sample", "_score", "_learn")}


def test_references_keep_every_bit_until_they_are_refreshed_and_share_no_buffer_with_the_policy(built):
    digests = []
    for state in states(built, 9):
        policy = digest(state.train.params["model"])
        digests.append((policy, {name: digest(tree) for name, tree in state.references.items()}))
        for tree in state.references.values():
            assert not addresses(tree) & addresses(state.train)
    policies = [policy for policy, _ in digests]
    references = [names for _, names in digests]
    assert len(set(policies)) == 10  # every step changes the policy
    assert references[:3] == [{}, {}, {}]
    # PPO is entered before steps 2, 5 and 8; both are frozen at the first, "recent" again at the third.
    assert [r["ppo/sft"] for r in references[3:]] == [policies[2]] * 7
    assert [r["ppo/recent"] for r in references[3:]] == [policies[2]] * 6 + [policies[8]]


TOKENS = (
    "phases.ppo.reward={parts: {length: {reward: {name: token_length, target: 6}}}, combine: weighted_sum, "
    "baseline: null}"
)


@pytest.mark.parametrize("reward", [[], [TOKENS]], ids=["texts", "tokens"])
def test_after_its_first_step_no_phase_moves_data_that_it_was_not_told_to_move(built, tmp_path, reward):
    built = experiment(tmp_path, *reward) if reward else built
    for step, state in enumerate(states(built, 3)):
        last = state, step
    state = last[0]
    with jax.transfer_guard("disallow"):
        for _ in range(3):  # ppo sft ppo
            phase = built.phases[built.scheduler.choose(state.schedule)]
            state = take_step(built, phase, state)
    assert state.schedule.steps == {"sft": 3, "ppo": 3}


def test_with_no_share_for_ppo_the_run_is_a_pure_sft_run_bit_for_bit(tmp_path):
    mixed = train(
        experiment(
            tmp_path / "mixed", "steps=4", "scheduler={name: ratio, first: sft, second: ppo, share: 0.0}"
        )
    )
    pure = train(experiment(tmp_path / "pure", "steps=4", SFT_ALONE))
    assert mixed.schedule.steps == pure.schedule.steps == {"sft": 4}
    assert "ppo/value" not in pure.train.params  # no PPO at all
    assert bits(mixed.train.params["model"]) == bits(pure.train.params["model"])
    assert bits(mixed.train.opt_state["sft"]) == bits(pure.train.opt_state["sft"])


def test_with_the_whole_share_for_ppo_the_run_is_a_pure_ppo_run_bit_for_bit(tmp_path):
    mixed = train(
        experiment(
            tmp_path / "mixed", "steps=3", "scheduler={name: ratio, first: sft, second: ppo, share: 1.0}"
        )
    )
    pure = train(experiment(tmp_path / "pure", "steps=3", PPO_ALONE))
    assert mixed.schedule.steps == pure.schedule.steps == {"ppo": 3}
    assert bits(mixed.train.params) == bits(pure.train.params)
    assert bits(mixed.train.opt_state["ppo"]) == bits(pure.train.opt_state["ppo"])
    assert bits(mixed.train.extra) == bits(pure.train.extra)


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(tmp_path):
    # A schedule that looks at the horizon would take other rates in a run that was planned to be shorter.
    constant = [f"phases.{phase}.optimizer.schedule={{name: constant}}" for phase in ("sft", "ppo")]
    short = train(experiment(tmp_path / "run", "steps=3", *constant))
    assert short.step == 3
    longer = train(experiment(tmp_path / "run", "steps=5", *constant))
    whole = train(experiment(tmp_path / "whole", "steps=5", *constant))
    assert bits(longer.train) == bits(whole.train)
    assert bits(longer.references) == bits(whole.references)
    assert bits(longer.host) == bits(whole.host)
    assert (longer.schedule, longer.cursors) == (whole.schedule, whole.cursors)
