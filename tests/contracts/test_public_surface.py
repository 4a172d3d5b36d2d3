"""Everything public, from `hybrid_jax` itself and used as the README and docs/extending.md use it."""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import hybrid_jax as hj
from hybrid_jax.core.registry import Registry
from hybrid_jax.testing import TINY, PrefixTable, tiny_decoder_folder, tiny_rows

ROOT = Path(__file__).parents[2]


def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    data = {"name": "jsonl", "train": str(folder / "data.jsonl"), "held_out_fraction": 0.2}
    settings = {**TINY, "run_dir": str(folder / "run"), "data": data, "compilation_cache": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return hj.load_pretrained(tiny_decoder_folder(tmp_path_factory.mktemp("model")), dtype="float32")


def test_the_package_is_imported_at_once_and_jax_only_when_something_is_asked_for():
    code = (
        "import sys, time; began = time.perf_counter(); import hybrid_jax;"
        "print(time.perf_counter() - began, 'jax' in sys.modules, len(dir(hybrid_jax)) > 90)"
    )
    seconds, *rest = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 0.3
    assert rest == ["False", "True"]


def test_a_public_name_is_a_thing_and_the_name_of_a_command_is_a_module():
    for name in hj.__all__:
        assert not inspect.ismodule(getattr(hj, name)), name
    submodules = {module.name for module in pkgutil.iter_modules(hj.__path__)}
    assert not submodules & set(hj.__all__)
    with pytest.raises(AttributeError, match="module 'hybrid_jax' has no attribute 'no_such_name'"):
        hj.no_such_name  # noqa: B018


def test_every_registry_is_public_so_that_a_file_of_ones_own_can_register():
    registries = {}
    for path in (ROOT / "hybrid_jax").rglob("*.py"):
        for name in re.findall(r"^([A-Z_]+)(?:: .+)? = Registry\(", path.read_text(), re.MULTILINE):
            module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            registries[name] = getattr(importlib.import_module(module), name)
    assert len(registries) > 10
    for name, registry in registries.items():
        assert isinstance(registry, Registry)
        assert getattr(hj, name) is registry


def test_a_trainer_takes_a_config_and_a_function_trains_answers_and_saves(config, tmp_path):
    trainer = hj.HybridTrainer(config, reward=brevity, overrides=[f"run_dir={tmp_path / 'mine'}", "steps=2"])
    assert trainer.train()["evaluation/score"] < 0
    assert [type(answer) for answer in trainer.generate(["say 1:"])] == [str]
    trainer.save_pretrained(tmp_path / "out")
    model, params = hj.load_pretrained(tmp_path / "out")
    assert model.apply(params, jnp.zeros((1, 3), jnp.int32)).logits.shape == (1, 3, model.vocab_size)


def test_an_experiment_is_built_from_a_config_with_overrides_and_trains(config, tmp_path):
    loaded = hj.load_config(config, overrides=["seed=1", "steps=1", f"run_dir={tmp_path / 'run'}"])
    assert isinstance(loaded, hj.ExperimentConfig)
    assert loaded.seed == 1
    experiment = hj.build(loaded)
    assert isinstance(experiment, hj.Experiment)
    state = experiment.train()
    assert isinstance(state, hj.RunState)
    assert state.step == 1
    with pytest.raises(hj.UserError, match="unknown setting 'sed'; did you mean 'seed'"):
        hj.load_config(config, overrides=["sed=1"])


def test_a_model_gives_logits_and_hidden_states_and_saves_to_the_same_numbers(pretrained, tmp_path):
    model, params = pretrained
    tokens = jnp.asarray([[1, 2, 3, 4], [0, 0, 5, 6]], jnp.int32)
    mask = jnp.asarray([[True] * 4, [False, False, True, True]])
    apply = jax.jit(model.apply)
    output = apply(params, tokens, mask)
    assert (output.logits.shape, output.logits.dtype) == ((2, 4, model.vocab_size), jnp.float32)
    assert output.hidden.shape == (2, 4, model.width)
    alone = apply(params, tokens[1:, 2:], mask[1:, 2:])  # left padding changes nothing
    np.testing.assert_allclose(output.logits[1, 2:], alone.logits[0], rtol=1e-5, atol=1e-6)
    hj.save_pretrained(tmp_path / "again", model, params)
    again, same = hj.load_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(jax.jit(again.apply)(same, tokens, mask).logits, output.logits)


def test_samples_come_with_the_log_probs_of_what_was_chosen(pretrained):
    model, params = pretrained
    tokens, mask = jnp.asarray([[0, 7, 8]], jnp.int32), jnp.asarray([[False, True, True]])
    samples = hj.sample(
        model,
        params,
        tokens,
        mask,
        jax.random.key(0),
        max_new_tokens=5,
        temperature=0.7,
        top_k=None,
        top_p=None,
        eos_ids=(0,),
    )
    assert samples.tokens.shape == samples.log_probs.shape == samples.action_mask.shape == (1, 5)
    whole = jnp.concatenate([tokens, samples.tokens], 1)
    read = jnp.concatenate([mask, samples.action_mask], 1)
    logits = np.asarray(jax.jit(model.apply)(params, whole, read).logits[0], np.float64) / 0.7
    for t in range(int(samples.action_mask.sum())):  # item t + 2 of the logits scores response token t
        scores = logits[t + 2]
        expected = scores[int(samples.tokens[0, t])] - np.log(np.exp(scores).sum())
        assert float(samples.log_probs[0, t]) == pytest.approx(expected, abs=1e-5)


def test_what_has_no_folder_of_that_kind_is_one_line(pretrained, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(
        hj.UserError, match="dtype must be float32 or bfloat16 for an encoder-decoder, got float16"
    ):
        hj.load_pretrained(tmp_path, dtype="float16")
    with pytest.raises(hj.UserError, match="a model of type PrefixTable has no Hugging Face format"):
        hj.save_pretrained(tmp_path / "out", PrefixTable(), {})
