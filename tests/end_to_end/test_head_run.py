"""A run that trains a classifier or a reward model: every command, and its model as a reward."""

import json
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax import HybridTrainer, evaluate, export, generate, train
from hybrid_jax.core.cli import _exit_code
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.composite import CompositeReward

CONFIGS = Path(__file__).parents[2] / "configs" / "debug"
QUIET = ["compilation_cache=null"]


@pytest.fixture(scope="module", params=["classifier", "reward_model"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    start = ["--config", str(CONFIGS / f"{request.param}.yaml"), f"run_dir={folder}", *QUIET]
    assert _exit_code(train.main, start) == 0
    return request.param, folder


def last_evaluation(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == "evaluation"][-1]


def test_the_exported_model_is_a_reward_by_its_path(run):
    kind, folder = run
    settings = {"label": 1} if kind == "classifier" else {}
    parts = {"trained": {"reward": {"name": kind, "path": str(folder / "model"), **settings}}}
    reward = parse(CompositeReward, {"parts": parts})
    prompts, responses = ["How was it?"] * 4, ["good and kind", "", "bad 漢字 🙂", "thank you " * 300]
    raw = reward.raw(prompts, responses)["trained"]
    assert np.isfinite(raw).all()
    assert len(set(raw.tolist())) == 4
    again = reward.raw(prompts[::-1], responses[::-1])["trained"]
    assert again[::-1].tobytes() == raw.tobytes()


def test_evaluate_and_export_read_the_newest_checkpoint(run, command, tmp_path):
    _, folder = run
    code, out, _ = command(evaluate.main, "--run", folder, "--json", tmp_path / "numbers.json")
    assert code == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    logged = last_evaluation(folder)
    assert numbers["accuracy"] == logged["evaluation/accuracy"]
    assert "accuracy" in out
    code, _, _ = command(export.main, "--run", folder, "--output", tmp_path / "out")
    assert code == 0
    for name in ("config.json", "model.safetensors", "extra.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_a_notebook_trains_it_too(run):
    kind, folder = run
    trainer = HybridTrainer(CONFIGS / f"{kind}.yaml", overrides=[f"run_dir={folder}", *QUIET])
    assert trainer.train()["evaluation/accuracy"] == last_evaluation(folder)["evaluation/accuracy"]
    with pytest.raises(UserError, match="trains heads and no language model, so it gives no answers"):
        trainer.generate(["hello"])


def test_what_only_a_policy_can_do_is_refused_in_one_line(run, command, tmp_path):
    _, folder = run
    code, _, error = command(generate.main, "--run", folder, "--prompt", "hello")
    assert code == 2
    assert "trains heads and no language model, so it gives no answers" in error
    code, _, error = command(export.main, "--run", folder, "--output", tmp_path / "o", "--dtype", "bfloat16")
    assert code == 2
    assert "trains no language model: --adapter, --value and --dtype are for one" in error


def test_a_phase_and_a_model_that_do_not_fit_are_refused(command, tmp_path):
    phases = ["phases={sft: {batch_size: 4}}", "scheduler={name: alternation, cycle: {sft: 1}}"]
    start = ["--config", CONFIGS / "reward_model.yaml", f"run_dir={tmp_path}", *QUIET, *phases]
    code, _, error = command(train.main, *start)
    assert code == 2
    assert (
        "phases.sft trains the next token, which the model ngrams does not have: on it only heads train"
        in error
    )
