"""A file that came from somewhere else never runs code here: only the user's own config may name any."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from hybrid_jax import evaluate, export, generate, report
from hybrid_jax.core.config import parse, to_dict
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.registry import EVERYTHING, Registry, names_in
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.experiment_config import ExperimentConfig, load_config, load_run_config, spelled_out
from hybrid_jax.models.folders.scorer import load_scorer
from hybrid_jax.rewards.composite import CompositeReward
from hybrid_jax.runs.policy import load_pretrained_policy

NAME = "planted_module:Thing"


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    """What appears when the module of that name is imported."""
    folder = tmp_path / "importable"
    folder.mkdir()
    mark = folder / "it_ran"
    (folder / "planted_module.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "def Thing(prompts, responses):\n    return []\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield mark
    sys.modules.pop("planted_module", None)


def placed(settings: dict, dotted: str, value) -> dict:
    """``settings`` with ``value`` at a dotted place."""
    copy = json.loads(json.dumps(settings))
    *path, last = dotted.split(".")
    inner = copy
    for key in path:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return copy


@pytest.fixture
def foreign_run(tiny, tmp_path):
    """Makes a run directory whose config somebody has changed."""

    def make(dotted: str, value) -> Path:
        settings = yaml.safe_load((tiny / "config.yaml").read_text())
        folder = tmp_path / "foreign"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(placed(settings, dotted, value)))
        Bytes().build([]).save(folder / "tokenizer")
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "phase": "sft", "sft/loss": 1.0}) + "\n")
        return folder

    return make


PLACES = [
    "model.name",
    "model.rope_scaling",
    "tokenizer",
    "data.name",
    "scheduler.name",
    "loggers",
    "phases.sft.name",
    "phases.sft.optimizer",
    "phases.sft.source",
    "phases.ppo.kl_control",
    "phases.ppo.reward.combine",
    "phases.ppo.reward.parts.length.reward",
    "phases.ppo.reward.parts.length.transform",
    "phases.ppo.reward.parts.length.normalise",
    "evaluation.judges",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_command_imports_what_a_run_names(place, foreign_run, planted, command, tmp_path):
    value = {"loggers": [NAME], "evaluation.judges": {"x": NAME}}.get(place, NAME)
    run = foreign_run(place, value)
    code, _, err = command(evaluate.main, "--run", run)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{NAME!r} runs code of its own, which only a config that you give yourself may ask for" in err
    assert "; if you trust this run, give --trust, or --config with the file that you trained it by" in err
    for main, *more in [
        (generate.main, "--prompt", "a"),
        (export.main, "--output", tmp_path / "out"),
        (report.main,),
    ]:
        command(main, "--run", run, *more)  # whatever it says, for it may need none of that
    with pytest.raises(UserError):
        load_run_config(run)
    spelled_out(yaml.safe_load((run / "config.yaml").read_text()), trust=frozenset())  # of a run that goes on
    assert not planted.exists()


@pytest.mark.parametrize("main", [generate.main, export.main, evaluate.main])
def test_a_run_is_trusted_by_a_flag_or_by_a_config_of_the_user_s_own(
    main, foreign_run, planted, command, tmp_path
):
    run = foreign_run("model.name", NAME)
    more = {generate.main: ["--prompt", "a"], export.main: ["--output", tmp_path / "out"]}.get(main, [])
    code, _, err = command(main, "--run", run, *more)
    assert code == 2
    assert f"backbone {NAME!r} runs code of its own" in err
    assert "give --trust" in err
    (tmp_path / "other.yaml").write_text("model: {name: decoder}\n")
    command(main, "--run", run, *more, "--config", tmp_path / "other.yaml")
    assert not planted.exists()
    (tmp_path / "mine.yaml").write_text(f"model: {{name: '{NAME}'}}\n")
    err = command(main, "--run", run, *more, "--config", tmp_path / "mine.yaml")[2]
    assert planted.exists()
    assert "give --trust" not in err
    planted.unlink()
    sys.modules.pop("planted_module")
    command(main, "--run", run, *more, "--trust")
    assert planted.exists()


def test_a_model_folder_imports_nothing(tmp_path, planted):
    """A scorer in a folder holds settings, and among them components."""
    small = {"vocab_size": 8, "num_layers": 1, "width": 8, "num_heads": 2, "max_length": 8}
    decoder = {"name": "decoder", **small}
    plain = {"name": "regression"}
    for kind, model, head in [
        ("rope scaling", {**decoder, "rope_scaling": NAME}, plain),
        ("rope scaling", {**decoder, "rope_scaling": {"name": NAME}}, plain),
        ("backbone", {"name": NAME}, None),
        ("head", decoder, {"name": NAME}),
    ]:
        settings = {"model_type": "hybrid_jax", "vocab_size": 8, "model": model, "head": head}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        for load in (load_scorer, load_pretrained_policy):
            with pytest.raises(Untrusted, match=f"{kind} 'planted_module:Thing' runs code.*give --trust"):
                load(tmp_path)
    assert not planted.exists()


def test_parse_trusts_nothing_unless_it_is_told_to_and_a_registry_never_imports(planted):
    parts = {"parts": {"a": {"reward": NAME}}}
    with pytest.raises(
        Untrusted, match=r"^parts\.a\.reward: reward 'planted_module:Thing' runs code of its own"
    ):
        parse(CompositeReward, parts)
    with pytest.raises(Untrusted):
        parse(CompositeReward, parts, trust={"planted_module:Other"})
    with pytest.raises(UserError, match="unknown thing 'planted_module:Thing'"):
        Registry("thing")[NAME]
    assert not planted.exists()
    assert parse(CompositeReward, parts, trust=names_in(parts)).parts["a"].reward.__name__ == "Thing"
    assert planted.exists()


def test_a_run_names_neither_a_pickle_nor_an_address_that_a_key_goes_to():
    endpoint = {"url": "https://elsewhere.example/v1", "model": "m", "api_key_env": "OPENAI_API_KEY"}
    for reward, risk in [
        ({"name": "comet", "checkpoint": "a.ckpt"}, "unpickles its checkpoint"),
        ({"name": "detoxify", "checkpoint": "a.ckpt"}, "unpickles its checkpoint"),
        ({"name": "bleurt", "checkpoint": "a"}, "runs the program in its checkpoint"),
        ({"name": "rubric_judge", "endpoint": endpoint}, "sends a key to the address in its settings"),
        ({"name": "pairwise_judge", "endpoint": endpoint}, "sends a key to the address in its settings"),
    ]:
        parts = {"parts": {"a": {"reward": reward}}}
        with pytest.raises(Untrusted, match=risk):
            parse(CompositeReward, parts)
        assert parse(CompositeReward, parts, trust=EVERYTHING)


def test_the_config_of_the_command_line_and_of_python_is_code(tiny, planted):
    override = f"phases.ppo.reward.parts.length.reward={NAME}"
    config = load_config(tiny / "config.yaml", [override])
    assert planted.exists()
    assert config.phases["ppo"].reward.parts["length"].reward.__name__ == "Thing"
    assert parse(ExperimentConfig, to_dict(config), trust=EVERYTHING) == config


def test_a_run_lends_no_names_to_the_one_that_it_starts_from(foreign_run, planted, command, tmp_path):
    """A text anywhere in a run's config may be the name of code; it trusts none in another run's config."""
    shutil.copytree(foreign_run("model.name", NAME), tmp_path / "other")
    (tmp_path / "other" / "checkpoints" / "2").mkdir(parents=True)
    run = foreign_run("start_from", str(tmp_path / "other"))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["response_field"] = NAME
    settings["heads"] = {"a": {"name": "regression"}}
    settings |= {
        "phases": {"classifier": {"head": "a"}},
        "scheduler": {"name": "alternation", "cycle": {"classifier": 1}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "environment.json").write_text(json.dumps({"packages": {"hybrid_jax": "0.5.0"}}))
    for main, *more in [(evaluate.main,), (export.main, "--output", tmp_path / "out")]:
        code, _, error = command(main, "--run", run, *more)
        assert not planted.exists()
        assert (code, error.count("\n")) == (2, 1)
        assert "holds no checkpoint yet" in error


@pytest.mark.parametrize("broken", [{"phases": {"sft": None}}, {"phases": ["sft"]}, {"evaluation": "all"}])
def test_a_run_whose_config_is_not_as_a_run_writes_it_is_one_line(broken, foreign_run, command, tmp_path):
    run = foreign_run(*next(iter(broken.items())))
    for main, *more in [
        (evaluate.main,),
        (generate.main, "--prompt", "a"),
        (export.main, "--output", tmp_path / "o"),
    ]:
        code, _, error = command(main, "--run", run, *more)
        assert (code, error.count("\n")) == (2, 1)
        assert "config.yaml is not as a run writes it: phases and evaluation hold settings" in error
