"""The measurements themselves are no test's business; that they run is."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import pytest

from hybrid_jax.core.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
    module = _load("bench")
    yield module
    del sys.modules["bench"]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("kind", ["sft", "rollout", "ppo"])
def test_every_kind_builds(bench, kind):
    assert callable(bench.our_step(bench.work_of(kind, "tiny")))


def test_the_reward_model_scores_the_last_token_of_a_response(bench):
    work = bench.work_of("ppo", "tiny")
    reward = bench.RewardModel.random(work.decoder().build(work.vocab_size))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, work.vocab_size)
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
        (["rollout", "--top-k", "few"], '--top-k must be a number or "none", got few'),
        (["sft", "--turns", "0"], "--turns must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(bench, arguments, words, monkeypatch):
    monkeypatch.delenv(bench.PEER_PYTHON, raising=False)
    with pytest.raises(UserError, match=words):
        bench.main(arguments)


@pytest.mark.slow
def test_slots_are_compared_with_batches_and_with_all_prompts_at_once(bench, capsys):
    slots = _load("bench_slots")
    few = {"slots": 2, "prompts-per-slot": 2, "max-length": 4, "turns": 1, "steps": 1}
    slots.main([part for name, number in few.items() for part in (f"--{name}", str(number))])
    record = json.loads(capsys.readouterr().out)
    assert record["prompts"] == 4
    assert {"seconds", "ratio", "whole_ratio"} < {*record}
    with pytest.raises(UserError, match="--slots must be at least 1, got 0"):
        slots.main(["--slots", "0"])
