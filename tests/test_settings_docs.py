"""docs/settings.md and configs/schema.json say what the dataclasses say."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hybrid_jax.core.ranges import Count, settings
from hybrid_jax.core.yaml_text import read_yaml
from hybrid_jax.experiment import load_config
from hybrid_jax.testing import TINY

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("settings_docs", ROOT / "scripts" / "settings_docs.py")
docs = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = docs  # dataclasses look there
SPEC.loader.exec_module(docs)

WHOLE: dict[str, Any] = {**TINY, "run_dir": "runs/a", "data": "restaurants"}
REWARD = {"parts": {"length": {"reward": {"name": "length", "target": 6}}}}


@pytest.fixture(scope="module")
def schema():
    return jsonschema.Draft7Validator(json.loads((ROOT / "configs" / "schema.json").read_text()))


def test_the_page_and_the_schema_are_what_the_script_writes_now():
    advice = "run python scripts/settings_docs.py"
    assert (ROOT / "docs" / "settings.md").read_text() == docs.page(), advice
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == docs.schema(), advice


def test_the_schema_is_one_and_takes_every_config_that_we_ship(schema):
    schema.check_schema(schema.schema)
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(configs) > 20
    for path in configs:
        error = jsonschema.exceptions.best_match(schema.iter_errors(read_yaml(path)))
        assert error is None, (path, list(error.absolute_path), error.message)


def changed(**settings) -> dict[str, Any]:
    return {**WHOLE, **settings}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        (changed(sed=1), changed(seed=1)),
        (changed(seed=-1), changed(seed=0)),
        (changed(mesh={"datas": 1}), changed(mesh={"data": 1})),
        (changed(model={"name": "decoder", "widht": 8}), changed(model={"name": "decoder", "width": 8})),
        (changed(model="decodr"), changed(model="decoder")),
        (changed(model={"name": "decodr"}), changed(model={"name": "my_models.mine:Mine", "depth": 3})),
        (changed(phases={"sft": {"batchsize": 4}}), changed(phases={"sft": {"batch_size": 4}})),
        (changed(phases={"mine": {"name": "sft", "packin": True}}), changed(phases={"mine": {"name": "sft"}})),
        (
            changed(phases={"sft": {"optimizer": {"learning_rat": 1e-3}}}),
            changed(phases={"sft": {"optimizer": {"learning_rate": 1e-3}}}),
        ),
        (
            changed(phases={"sft": {"optimizer": {"name": "lion", "epsilon": 1e-8}}}),
            changed(phases={"sft": {"optimizer": {"name": "lion", "beta1": 0.8}}}),
        ),
        (
            changed(
                phases={"ppo": {"reward": {"parts": {"length": {"reward": {"name": "length", "targt": 6}}}}}}
            ),
            changed(phases={"ppo": {"reward": REWARD}}),
        ),
        (
            changed(scheduler={"name": "alternation", "cycle": {"sft": -1}}),
            changed(scheduler={"name": "alternation", "cycle": {"sft": 1}, "warmup": {"sft": 3}}),
        ),
        (changed(evaluation={"num_prompts": 1.5}), changed(evaluation={"num_prompts": 1, "every": None})),
        ({"base": 3}, {"base": "other.yaml", "phases": {"ppo": {"epochs": 4}}, "phases.ppo.epochs": 2}),
        ({"run_dir": "runs/a"}, WHOLE),
    ],
)
def test_a_mistyped_config_is_marked_and_the_right_one_is_not(schema, wrong, right):
    assert not schema.is_valid(wrong)
    schema.validate(right)


def test_what_the_schema_takes_the_program_takes(schema, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(WHOLE))
    schema.validate(read_yaml(tmp_path / "config.yaml"))
    load_config(tmp_path / "config.yaml")


@settings
class Sentences:
    """A class whose fields say what they are.

    Attributes:
        first, second: two numbers that
            go together.
        text: under Attributes, which wins.
    """

    first: Count = 1
    second: Count = 2
    text: str = "a"  # behind the field
    choice: str | None = None  # behind; None has none
    long: dict[str, int] = docs.dataclasses.field(  # behind the first line
        default_factory=dict
    )
    # above a field is about what follows
    silent: bool = False


def test_a_sentence_stands_under_attributes_or_behind_the_field():
    assert {setting.name: setting.sentence for setting in docs.settings_of(Sentences)} == {
        "first": "two numbers that go together.",
        "second": "two numbers that go together.",
        "text": "under Attributes, which wins.",
        "choice": "behind; None has none",
        "long": "behind the first line",
        "silent": "",
    }


def test_ranges_and_types_are_told_in_words_and_kept_by_the_schema():
    first, choice = docs.settings_of(Sentences)[0], docs.settings_of(Sentences)[3]
    assert docs.words(first.hint) == "a whole number ≥ 1"
    assert docs.words(choice.hint) == "a text or null"
    written = docs._object(Sentences)["properties"]
    assert written["first"] == {
        "type": "integer",
        "minimum": 1,
        "description": "two numbers that go together.",
        "default": 1,
    }
    assert written["choice"]["anyOf"] == [{"type": "string", "minLength": 1}, {"type": "null"}]
