"""scripts/many_seeds.py: what cannot be one program is refused in one line."""

import importlib.util
from pathlib import Path

import pytest

from hybrid_jax.core.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def many_seeds():
    spec = importlib.util.spec_from_file_location("many_seeds", ROOT / "scripts" / "many_seeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PPO_ALONE = "scheduler={name: alternation, cycle: {ppo: 1}, warmup: {sft: 0}}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "configs/debug/hybrid.yaml", PPO_ALONE],
            r"must be on the device \(token_count, token_length\); phases.ppo.reward has coverage, length",
        ),
        (
            ["--config", "configs/debug/hybrid.yaml"],
            "must choose ppo and nothing else, .*, got sft, ppo for 8 steps",
        ),
        (
            ["--config", "configs/debug/classifier.yaml"],
            "nothing else, for at least 1 step, got classifier for",
        ),
        (["steps=0"], "nothing else, for at least 1 step, got ppo for 0 steps"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
    ],
)
def test_what_cannot_be_one_program_is_refused(many_seeds, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        many_seeds.main(arguments)
