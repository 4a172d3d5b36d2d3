"""HybridTrainer: what a notebook does with it."""

import json
import signal
import subprocess
import sys

import pytest
import yaml

from hybrid_jax import HybridTrainer, evaluate, train
from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.experiment import load_config
from hybrid_jax.models.decoder import DecoderConfig
from hybrid_jax.rewards.text import Length
from hybrid_jax.training.interrupts import Interrupted


def vowels(prompts, responses, number):
    """Counts vowels; needs a column of the data."""
    assert all(isinstance(n, int) for n in number)
    return [sum(letter in "aeiou" for letter in response) for response in responses]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer") / "run"
    trainer = HybridTrainer(tiny / "config.yaml", reward=vowels, overrides=[f"run_dir={folder}"])
    return trainer, trainer.train()


@pytest.mark.slow
def test_a_function_becomes_the_one_part_of_the_reward_named_after_itself(trained):
    trainer, numbers = trained
    parts = trainer.config.phases["ppo"].reward.parts
    assert {name: (part.reward, part.weight) for name, part in parts.items()} == {"vowels": (vowels, 1.0)}
    assert numbers["evaluation/reward/vowels"] == numbers["evaluation/score"]


def test_evaluate_repeats_the_last_evaluation_of_training(trained):
    trainer, numbers = trained
    assert trainer.evaluate() == numbers


def test_an_evaluation_keeps_the_value_of_each_prompt_for_paired_comparisons(trained):
    trainer, numbers = trained
    lines = (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()
    last = [record for record in map(json.loads, lines) if record["phase"] == "evaluation"][-1]
    assert set(last["by_prompt"]) == {"evaluation/score", "evaluation/reward/vowels"}
    for metric, values in last["by_prompt"].items():
        assert sum(values) / len(values) == pytest.approx(numbers[metric], rel=1e-5)


def test_generate_answers_each_prompt_with_the_settings_given(trained):
    trainer, _ = trained
    answers = trainer.generate(["say 1:", "say 2:"], num_samples=2, seed=4)
    assert len(answers) == 4
    assert trainer.generate(["say 1:", "say 2:"], num_samples=2, seed=4) == answers
    greedy = trainer.generate("say 1:", temperature=0, max_new_tokens=3)
    assert greedy == trainer.generate("say 1:", temperature=0, max_new_tokens=3, seed=9)
    with pytest.raises(UserError, match=r"unknown setting 'sampler\.temprature'; did you mean 'temperature'"):
        trainer.generate("say 1:", temprature=0)


def test_another_trainer_of_the_same_run_goes_on_from_its_checkpoint(trained):
    trainer, _ = trained
    again = HybridTrainer(trainer.config)
    assert again.generate("say 1:", seed=2) == trainer.generate("say 1:", seed=2)
    assert again.policy.step == 3


def test_after_a_training_that_was_interrupted_the_policy_is_read_again(trained, monkeypatch):
    def stop(experiment):
        raise Interrupted(signal.SIGINT)

    trainer = HybridTrainer(trained[0].config)
    before = trainer.policy
    assert trainer.policy is before
    monkeypatch.setattr("hybrid_jax.experiment.train", stop)
    with pytest.raises(KeyboardInterrupt, match="the run is saved"):
        trainer.train()
    assert trainer.policy is not before


def test_a_branch_that_has_not_begun_answers_with_the_policy_that_it_starts_from(trained, tiny, tmp_path):
    folder = trained[0].config.run_dir
    branch = HybridTrainer(tiny / "config.yaml", vowels, run_dir=tmp_path / "run", start_from=str(folder))
    assert branch.generate("say 1:", seed=2) == trained[0].generate("say 1:", seed=2)
    assert branch.policy.step == 3
    assert not (tmp_path / "run").exists()


def test_an_untrained_policy_answers_too(tiny, tmp_path):
    trainer = HybridTrainer(tiny / "config.yaml", run_dir=tmp_path / "run")
    assert len(trainer.generate(["say 1:"])) == 1
    assert not (tmp_path / "run").exists()


def test_save_pretrained_and_report_write_what_the_commands_write(trained, tmp_path):
    trainer, _ = trained
    folder = trainer.save_pretrained(tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    assert (folder / "tokenizer.json").is_file()
    assert trainer.report().read_text().startswith("<!doctype html>")


def letters(responses):
    return [len(response) for response in responses]


def test_an_importable_function_is_found_again_by_a_config_file(tiny, tmp_path):
    trainer = HybridTrainer(tiny / "config.yaml", reward=letters, run_dir=tmp_path)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(trainer.config)))
    again = load_config(tmp_path / "again.yaml").phases["ppo"].reward.parts["letters"]
    assert again.reward is letters


def test_a_lambda_is_noted_by_its_name_and_the_command_line_says_that_it_is_needed(tiny, tmp_path, command):
    trainer = HybridTrainer(
        tiny / "config.yaml",
        reward=lambda prompts, responses: [0.0] * len(responses),
        run_dir=tmp_path,
        steps=2,
    )
    trainer.train()
    assert list(trainer.config.phases["ppo"].reward.parts) == ["reward"]
    code, out, err = command(train.main, "--config", tmp_path / "config.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "<lambda>' was given from Python and lives only there: go on with HybridTrainer" in err
    assert command(evaluate.main, "--run", tmp_path)[2] == err


def test_data_may_be_a_list_of_rows_or_examples_a_tenth_of_it_held_out(tiny, tmp_path, command):
    rows = [{"prompt": f"say {i}:", "completion": str(i)} for i in range(40)]
    examples = [Example(row["prompt"], row["completion"]) for row in rows]
    first, second = (
        HybridTrainer(tiny / "config.yaml", data=d, run_dir=tmp_path).config.data for d in (rows, examples)
    )
    assert first == second
    train_split, held_out = first.load("train"), first.load("held_out")
    assert (len(train_split), len(held_out)) == (36, 4)
    assert sorted((*train_split, *held_out), key=lambda e: int(e.response)) == examples
    HybridTrainer(tiny / "config.yaml", data=rows, run_dir=tmp_path, steps=1).train()
    code, _, err = command(train.main, "--config", tmp_path / "config.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "data was given from Python as a list: go on with HybridTrainer" in err
    with pytest.raises(UserError, match=r"holds a run of another config: data\.digest"):
        HybridTrainer(tiny / "config.yaml", data=rows[1:], run_dir=tmp_path)


def test_model_and_data_may_be_components_mappings_or_a_folder(tiny, trained, tmp_path):
    folder = trained[0].save_pretrained(tmp_path / "model")
    config = load_config(tiny / "config.yaml")
    for model in (config.model, {"name": "decoder", "width": 24, "max_length": 48, "num_heads": 2}):
        trainer = HybridTrainer(config, model=model, data=config.data, run_dir=tmp_path / "run")
        assert isinstance(trainer.config.model, DecoderConfig)
    trainer = HybridTrainer(tiny / "config.yaml", model=folder, run_dir=tmp_path / "run")
    assert trainer.policy.tokenizer.eos_id == 256
    assert trainer.generate("say 1:", seed=3) == trained[0].generate("say 1:", seed=3)


def test_a_reward_may_be_a_component_or_the_mapping_of_a_config_file(tiny, tmp_path):
    def parts(reward):
        config = HybridTrainer(load_config(tiny / "config.yaml"), reward=reward, run_dir=tmp_path).config
        return {name: part.reward for name, part in config.phases["ppo"].reward.parts.items()}

    assert parts(Length(target=3)) == {"Length": Length(target=3)}
    mixed = {
        "parts": {"mine": {"reward": vowels, "weight": 2}, "short": {"reward": {"name": "length", "target": 1}}}
    }
    assert parts(mixed) == {"mine": vowels, "short": Length(target=1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean 'steps'"),
        ({"reward": {"parts": {}}}, r"reward.parts must not be empty, got \{\}"),
        ({"reward": 3}, r"reward must be a function, a component or \{parts: \.\.\.\}, got 3"),
        ({"model": "no_such_folder"}, "model must be a component, a mapping or a Hugging Face folder"),
        ({"data": [{"prompt": "a"}]}, r"data\[0\]: no field 'completion'"),
        ({"data": []}, "data has no train examples"),
        (
            {"phases": {"sft": {}}, "scheduler": {"name": "alternation", "cycle": {"ppo": 1}}},
            "scheduler chooses",
        ),
    ],
)
def test_mistakes_are_one_line(tiny, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        HybridTrainer(tiny / "config.yaml", run_dir=tmp_path, **arguments)


def test_examples_alone_are_enough_and_their_answers_have_no_score(tiny, tmp_path):
    trainer = HybridTrainer(
        tiny / "config.yaml",
        run_dir=tmp_path,
        steps=1,
        phases={"sft": {"batch_size": 4, "length": 32}},
        scheduler={"name": "alternation", "cycle": {"sft": 1}},
        overrides=["evaluation.sampler.max_new_tokens=4"],
    )
    numbers = trainer.train()
    assert "evaluation/response_length" in numbers
    assert "evaluation/score" not in numbers
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {sample["score"] for sample in samples} == {None}


def test_importing_the_package_imports_neither_jax_nor_transformers():
    script = "import sys, hybrid_jax; print({'jax', 'numpy', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
