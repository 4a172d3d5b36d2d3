"""The measurements themselves are no test's business; that they run is."""

import json

import jax
import numpy as np
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build
from hybrid_jax.phases.kept_log_probs import KeptLogProbs


@pytest.fixture(scope="module")
def bench(scripts):
    return scripts("bench")


@pytest.fixture(scope="module")
def work(scripts):
    return scripts("bench_work")


@pytest.mark.slow
def test_a_measurement_is_one_json_line(bench, capsys):
    bench.main(["sft", "--size", "tiny", "--turns", "1", "--steps", "1"])
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert {
        "kind",
        "size",
        "seconds",
        "tokens_per_second",
        "turns",
        "steps",
        "device",
        "commit",
        "versions",
    } == {*record}
    assert (record["kind"], record["size"]) == ("sft", "tiny")
    assert record["tokens_per_second"] == pytest.approx(16 * 256 / record["seconds"], rel=1e-3)
    assert record["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    "kind",
    [
        "sft",
        "rollout",
        "ppo",
        pytest.param("rloo", marks=pytest.mark.slow),
        pytest.param("grpo", marks=pytest.mark.slow),
    ],
)
def test_every_kind_builds(work, kind):
    assert callable(work.our_step(work.work_of(kind, "tiny")))


def test_pairs_are_of_one_length_half_prompt_and_known_to_the_reference_after_the_warm_up(work, monkeypatch):
    kept = []
    size = work.work_of("dpo", "tiny")
    monkeypatch.setattr(
        KeptLogProbs, "__init__", lambda self, order, rows: kept.append((len(order), rows)) or None
    )
    experiments = []
    monkeypatch.setattr(work, "build", lambda config: experiments.append(build(config)) or experiments[0])
    work.our_step(size)
    assert kept == [(16, 8)]  # two batches, and two steps of warm-up
    rows = experiments[0].phases["dpo"].stream.batch(0, 8)
    assert rows.tokens.shape == (8, 2, 256)
    assert (rows.segment_ids == 1).all()
    assert (rows.loss_mask == (np.arange(256) >= 128)).all()


def test_ppo_rloo_and_grpo_learn_from_as_many_responses(work):
    settings = {kind: work.phase_of(work.work_of(kind, "tiny", epochs=2)) for kind in ("ppo", "rloo", "grpo")}
    assert {(phase.rows, phase.epochs, phase.minibatches) for phase in settings.values()} == {(16, 2, 1)}
    assert [phase.samples_per_prompt for phase in settings.values()] == [1, 4, 4]


def test_the_reward_model_scores_the_last_token_of_a_response(work):
    size = work.work_of("ppo", "tiny")
    reward = work.RewardModel.random(size.decoder().build(size.vocab_size))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, size.vocab_size)
    mask = jax.numpy.arange(8)[None] < jax.numpy.array([[8], [6]])
    short = reward.score_tokens(tokens[1:, :6], mask[1:, :6], mask[1:, 4:6])
    assert reward.score_tokens(tokens, mask, mask[:, 4:])[1] == pytest.approx(float(short[0]), abs=1e-6)


class Fake:
    def __init__(self, *seconds):
        self.seconds, self.asked = iter(seconds), []

    def turn(self, steps):
        self.asked.append(steps)
        return [next(self.seconds) for _ in range(steps)]


def test_a_ratio_is_the_median_over_turns_without_their_first_steps(bench):
    compiling, waking = (99.0, 99.0), 50.0
    ours = Fake(*compiling, waking, 1.0, waking, 2.0, waking, 4.0)
    peer = Fake(*compiling, waking, 3.0, waking, 4.0, waking, 40.0)
    numbers = bench.measure(ours, peer, turns=3, steps=1)
    assert numbers == {"seconds": 2.0, "peer_seconds": 4.0, "ratio": 3.0}  # of 3, 2 and 10


def test_steps_of_several_kinds_are_compared_with_the_first_turn_by_turn(bench):
    compiling, waking = (99.0, 99.0), 50.0
    ppo = Fake(*compiling, waking, 6.0, waking, 8.0, waking, 9.0)
    rloo = Fake(*compiling, waking, 3.0, waking, 2.0, waking, 9.0)
    numbers = bench.measure_all({"ppo": ppo, "rloo": rloo}, turns=3, steps=1)
    assert numbers == {"ppo_seconds": 8.0, "rloo_seconds": 3.0, "rloo_ratio": 2.0}  # of 2, 4 and 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "--against", "hf"], "--against hf needs a Python with torch==2.13.0 transformers"),
        (["ppo", "--against", "hf"], "ppo is compared with trl, got --against hf"),
        (
            ["sft", "--against", "hf", "--peer-python", "nowhere"],
            "--peer-python must be a program, got nowhere",
        ),
        (["sft", "--against", "hf", "--peer-python", "false"], "the peer hf ended"),
        (["ppo", "--against", "tunix"], "ppo is compared with trl, got --against tunix"),
        (["rloo", "--against", "trl"], "rloo is compared with no peer, got --against trl"),
        (["grpo", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["rollout", "--top-k", "few"], '--top-k must be a number or "none", got few'),
        (["sft", "--turns", "0"], "--turns must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(bench, arguments, words, monkeypatch):
    monkeypatch.delenv(bench.PEER_PYTHON, raising=False)
    with pytest.raises(UserError, match=words):
        bench.main(arguments)


@pytest.mark.slow
def test_slots_are_compared_with_batches_and_with_all_prompts_at_once(scripts, capsys):
    slots = scripts("bench_slots")
    few = {"slots": 2, "prompts-per-slot": 2, "max-length": 4, "turns": 1, "steps": 1}
    slots.main([part for name, number in few.items() for part in (f"--{name}", str(number))])
    record = json.loads(capsys.readouterr().out)
    assert record["prompts"] == 4
    assert {"seconds", "ratio", "whole_ratio"} < {*record}
    with pytest.raises(UserError, match="--slots must be at least 1, got 0"):
        slots.main(["--slots", "0"])
