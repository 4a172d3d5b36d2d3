"""One trunk that is fine-tuned, rewarded and read by two heads, in one run."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax import evaluate, export
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.folders.hf import load_pretrained
from hybrid_jax.models.folders.scorer import load_scorer
from hybrid_jax.training.loop import train

CONFIG = Path(__file__).parents[2] / "configs" / "debug" / "heads.yaml"
TOKENS, MASK = np.arange(12, dtype=np.int32)[None] + 5, np.ones((1, 12), bool)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    experiment = build(load_config(CONFIG, [f"run_dir={tmp_path_factory.mktemp('heads') / 'run'}"]))
    return experiment, train(experiment)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_phase_trains_its_own_groups(trained):
    experiment, state = trained
    fresh = experiment.init().train.params
    moved = {
        group: any(
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(fresh[group]), strict=True)
        )
        for group, tree in state.train.params.items()
    }
    assert {"model", "heads/tone", "heads/quality"} < set(moved)
    assert all(moved.values())
    assert set(state.train.opt_state["classifier"]) == {"model", "heads/tone"}
    assert set(state.train.opt_state["reward_model"]) == {"heads/quality"}  # its trunk is read as it is


def test_a_killed_run_goes_on_to_the_same_bits(trained, tmp_path):
    experiment, state = trained
    folder = tmp_path / "run"
    shutil.copytree(experiment.files.folder, folder)
    for step in (6, 9):
        shutil.rmtree(folder / "checkpoints" / str(step))
    again = train(build(load_config(CONFIG, [f"run_dir={folder}"])))
    jax.tree.map(np.testing.assert_array_equal, again.train, state.train)


def test_each_phase_is_measured_under_its_own_name_and_the_report_shows_it(trained):
    experiment, _ = trained
    last = [record for record in records(experiment.files.folder) if record["phase"] == "evaluation"][-1]
    assert {"evaluation/loss", "evaluation/classifier/accuracy", "evaluation/reward_model/accuracy"} < set(last)
    report = (experiment.files.folder / "report.html").read_text()
    for name in ("classifier/accuracy", "reward_model/accuracy"):
        assert name in report


def test_evaluate_and_export_do_what_the_phases_allow(trained, command, tmp_path):
    experiment, state = trained
    run = experiment.files.folder
    code, out, _ = command(evaluate.main, "--run", run, "--json", tmp_path / "numbers.json")
    assert code == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())["numbers"]
    last = [record for record in records(run) if record["phase"] == "evaluation"][-1]
    for name in ("loss", "classifier/accuracy", "reward_model/margin"):
        assert numbers[name] == last[f"evaluation/{name}"]

    code, out, _ = command(export.main, "--run", run, "--output", tmp_path / "out")
    assert code == 0
    said = [line.partition("  ")[2] for line in out.splitlines()]
    assert said == ["(language model, step 9)", "(head tone, step 9)", "(head quality, step 9)"]
    model, params = load_pretrained(tmp_path / "out")
    expected = jax.jit(experiment.model.apply)(state.policy, TOKENS).logits
    np.testing.assert_array_equal(jax.jit(model.apply)(params, TOKENS).logits, expected)
    for phase in ("classifier", "reward_model"):
        steps = experiment.phases[phase]
        scorer, weights = load_scorer(tmp_path / "out" / "heads" / steps.head)
        expected = jax.jit(steps.scorer.apply)(steps.params_of(state), TOKENS, MASK)
        np.testing.assert_allclose(jax.jit(scorer.apply)(weights, TOKENS, MASK), expected, atol=1e-6)
        written = run / "heads" / steps.head / "model.safetensors"  # at the end of the training
        assert written.read_bytes() == (tmp_path / "out" / "heads" / steps.head / written.name).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phases.classifier.head=null"], "phases.classifier.head must name a head of the run, got none"),
        (["phases.classifier.head=mood"], "got 'mood'; heads: quality, tone"),
        (["heads.lm={name: regression}"], "heads must have other names than 'lm'"),
        (["heads={..: {name: regression}}"], "of letters, digits, '_' and '-', got '..'"),
        (["model={name: ngrams, labels: [a, b]}"], "model has no labels any more, a head on it has"),
        (["model={name: classifier, labels: [a, b]}"], "heads: {NAME: {name: classification"),
        (["model={name: ngrams}"], "phases.classifier trains the next token|phases.sft trains the next token"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(load_config(CONFIG, [f"run_dir={tmp_path}/run", *overrides]))
