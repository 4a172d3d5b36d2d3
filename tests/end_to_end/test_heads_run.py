"""One trunk that is fine-tuned, rewarded and read by two heads, in one run."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_jax import HybridTrainer, evaluate, export
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.folders.hf import load_pretrained
from hybrid_jax.models.folders.scorer import load_scorer
from hybrid_jax.models.heads import ClassificationHead
from hybrid_jax.runs.files import run_files
from hybrid_jax.runs.identity import keep_earlier
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


@pytest.mark.slow
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
        (["heads.a/b={name: regression}"], "got 'a/b'"),
        (["heads.tone={name: 'json:dumps'}"], "heads.tone: 'json:dumps' is no head: it has no 'labels'"),
        (["evaluation.sampler={name: 'json:dumps'}"], "'json:dumps' is no sampler: it has no 'max_new_tokens'"),
        (
            ["phases.ppo.name=policy_gradient", "phases.ppo.advantage={name: 'json:dumps'}"],
            "phases.ppo.advantage: 'json:dumps' is no advantage: it has no 'needs_value'",
        ),
        (["heads.third={name: regression}"], "heads.third is trained by no phase: say head: third in one"),
        (["model={name: ngrams, labels: [a, b]}"], "a model has no labels, a head on it has"),
        (["model={name: classifier, labels: [a, b]}"], "heads: {NAME: {name: classification"),
        (["model={name: ngrams}"], "phases.classifier trains the next token|phases.sft trains the next token"),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build(load_config(CONFIG, [f"run_dir={tmp_path}/run", *overrides]))


@dataclass(frozen=True)
class OfANotebook(ClassificationHead):
    """A head that no other process can find."""


OfANotebook.__module__ = "__main__"


def test_a_head_that_no_folder_can_hold_is_refused_before_the_first_step(tmp_path):
    config = load_config(CONFIG, [f"run_dir={tmp_path}/run"])
    heads = {**config.heads, "tone": OfANotebook(labels=("negative", "positive"))}
    with pytest.raises(UserError, match="head '__main__:OfANotebook' lives only in this program"):
        build(replace(config, heads=heads))


@pytest.fixture(scope="module")
def heads_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    start = [
        f"run_dir={folder}",
        "steps=2",
        "scheduler={name: alternation, warmup: {}, cycle: {classifier: 1, reward_model: 1}}",
    ]
    config = load_config(CONFIG, start)
    train(build(replace(config, phases={n: config.phases[n] for n in ("classifier", "reward_model")})))
    return folder


@pytest.mark.slow
def test_what_a_run_of_heads_alone_cannot_answer_is_one_line(heads_alone, command):
    code, _, error = command(evaluate.main, "--run", heads_alone, "--suite", "loss")
    assert code == 2
    assert "trains heads and no language model: the suite held_out measures heads" in error
    code, _, error = command(evaluate.main, "--run", heads_alone, "evaluation.num_promts=3")
    assert code == 2
    assert "did you mean 'num_prompts'" in error


@pytest.mark.slow
def test_several_heads_are_written_into_no_folder_of_somebody_else(heads_alone, command, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = command(export.main, "--run", heads_alone, "--output", tmp_path)
    assert code == 2
    assert "is not empty and no export of ours" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    code, _, _ = command(export.main, "--run", heads_alone, "--output", tmp_path / "out")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out" / "heads").iterdir()) == ["quality", "tone"]


def test_a_run_that_begins_anew_keeps_the_heads_of_the_earlier_one(heads_alone, trained, tmp_path):
    for folder, name in ((heads_alone, "model"), (trained[0].files.folder, "heads")):
        run = tmp_path / name
        shutil.copytree(folder, run)
        shutil.rmtree(run / "checkpoints")
        keep_earlier(run_files(run))
        assert (run / "earlier_1" / name).is_dir()
        assert not (run / name).exists()


def test_a_trainer_says_how_the_heads_of_0_4_are_spelled_now(tmp_path):
    settings = ["model={name: classifier, labels: [a, b]}", f"run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="a model has no labels, a head on it has"):
        HybridTrainer(CONFIG, overrides=settings)
