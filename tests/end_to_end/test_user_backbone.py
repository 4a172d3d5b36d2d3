"""The backbone of docs/training.md, from a file of its own: trained, exported, answering from its folder."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from hybrid_jax import export, generate, train
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.experiment import build, load_config
from hybrid_jax.models.folders.ours import load_ours
from hybrid_jax.runs.policy import load_policy

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
NAME = "written_in_the_docs:Bigram"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    folder = tmp_path_factory.mktemp("code")
    (folder / "written_in_the_docs.py").write_text(next(block for block in blocks if "class Bigram:" in block))
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("written_in_the_docs", None)


@pytest.fixture(scope="module")
def run(module, tiny, tmp_path_factory):
    settings = yaml.safe_load((tiny / "config.yaml").read_text())
    run_dir = tmp_path_factory.mktemp("bigram") / "run"
    config = run_dir.parent / "config.yaml"
    own = {
        "model": {"name": NAME, "size": 8},
        "run_dir": str(run_dir),
        "checkpoint": {"every": 3, "export_every": 3},
    }
    config.write_text(yaml.safe_dump(settings | own))
    train.main(["--config", str(config)])
    return run_dir


@pytest.mark.slow
def test_its_folder_gives_the_same_scores(run, command, tmp_path):
    code, out, _ = command(export.main, "--run", run, "--output", tmp_path / "out", "--trust")
    assert (code, "language model, step 3" in out) == (0, True)
    policy = load_policy(run, trust={NAME})
    tokens = np.arange(6)[None]
    expected = policy.model.apply(policy.params, tokens).logits
    for folder in (tmp_path / "out", run / "exports" / "step_3"):
        model, params = load_ours(folder, trust={NAME})
        assert model == policy.model
        np.testing.assert_array_equal(model.apply(params, tokens).logits, expected)


def test_its_folder_answers_as_its_run_does_where_it_is_trusted(run, command):
    folder = run / "exports" / "step_3"
    asked = ("--prompt", "say 1:", "sampler.max_new_tokens=8")
    expected = command(generate.main, "--run", run, *asked, "--trust")
    assert command(generate.main, "--model", folder, *asked, "--trust")[:2] == expected[:2]
    config = run.parent / "config.yaml"
    assert command(generate.main, "--model", folder, *asked, "--config", config)[0] == 0
    code, _, error = command(generate.main, "--model", folder, *asked)
    assert code == 2
    assert f"backbone '{NAME}' runs code of its own" in error
    assert "give --trust" in error
    with pytest.raises(Untrusted):
        load_ours(folder)


def test_numbers_that_are_not_finite_are_not_written(run, tmp_path):
    policy = load_policy(run, trust={NAME})
    broken = jax.tree.map(lambda x: x * np.nan, policy.params)
    with pytest.raises(UserError, match="parameter 'embedding' holds NaN"):
        policy.__class__(**{**vars(policy), "params": broken}).save_pretrained(tmp_path / "out")


def test_a_model_that_no_folder_can_name_is_refused_before_training_where_it_is_to_be_exported(tiny, tmp_path):
    from hybrid_jax import HybridTrainer
    from hybrid_jax.models.decoder import DecoderConfig

    class Local(DecoderConfig):
        """A class that only this function can find."""

    model = Local(num_layers=1, width=16, num_heads=2, max_length=48)
    with pytest.raises(UserError, match="lives only in this program"):
        HybridTrainer(
            tiny / "config.yaml",
            model=model,
            overrides=[f"run_dir={tmp_path}/run", "checkpoint.export_every=2"],
        )


def test_a_config_of_it_builds_only_what_the_user_named(run):
    assert build(load_config(run.parent / "config.yaml")).model.width == 8
