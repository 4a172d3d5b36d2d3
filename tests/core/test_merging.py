import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from hybrid_jax.core.config import load_yaml, parse, to_dict
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.merging import Place, merge, registry_of, without_extras, without_none
from hybrid_jax.core.registry import EVERYTHING, NOTHING, Registry
from hybrid_jax.experiment import ExperimentConfig, load_config

HYBRID = Path("configs/debug/hybrid.yaml")


def config(*overrides):
    return load_config(HYBRID, overrides)


def test_a_mapping_replaces_a_collection_however_deep_it_is_given():
    for override in (
        "phases={ppo: {reward: {parts: {mine: {reward: repetition}}}}}",
        "phases.ppo={reward: {parts: {mine: {reward: repetition}}}}",
        "phases.ppo.reward={parts: {mine: {reward: repetition}}}",
        "phases.ppo.reward.parts={mine: {reward: repetition}}",
    ):
        ppo = config(override).phases["ppo"]
        assert list(ppo.reward.parts) == ["mine"]
        assert (ppo.epochs, ppo.sampler.max_new_tokens) == (2, 16)  # settings stay
    for override in ("scheduler.cycle={sft: 1}", "scheduler={cycle: {sft: 1}}"):
        scheduler = config(override).scheduler
        assert (dict(scheduler.cycle), dict(scheduler.warmup)) == ({"sft": 1}, {"sft": 3})
    assert list(config("phases.ppo.references={start: {frozen_at: start}}").phases["ppo"].references) == [
        "start"
    ]


def test_a_dotted_path_changes_adds_or_removes_one_entry_and_leaves_the_others():
    parts = config("phases.ppo.reward.parts.length.weight=0.5").phases["ppo"].reward.parts
    assert (list(parts), parts["length"].weight, parts["length"].reward.target) == (
        ["coverage", "length"],
        0.5,
        15,
    )
    parts = config("phases.ppo.reward.parts.length={weight: 0.5}").phases["ppo"].reward.parts
    assert (parts["length"].weight, parts["length"].reward.target) == (
        0.5,
        15,
    )  # of one entry the settings merge
    parts = config("phases.ppo.reward.parts.new.reward=repetition").phases["ppo"].reward.parts
    assert list(parts) == ["coverage", "length", "new"]
    assert list(config("phases.ppo.reward.parts.length=null").phases["ppo"].reward.parts) == ["coverage"]
    assert dict(config("scheduler.cycle.ppo=null").scheduler.cycle) == {"sft": 1}
    # The reference "sft" is there by default: one more does not take its place, and it can be removed.
    assert list(config("phases.ppo.references.start.frozen_at=start").phases["ppo"].references) == [
        "sft",
        "start",
    ]
    assert config("phases.ppo.references.sft=null").phases["ppo"].references == {}
    gone = config("phases.ppo=null", "scheduler.cycle.ppo=null")
    assert list(gone.phases) == ["sft"]
    with pytest.raises(
        UserError, match=r"^phases\.ppo\.reward\.parts\.lenght=null removes nothing; did you mean 'l"
    ):
        config("phases.ppo.reward.parts.lenght=null")


def test_null_sets_an_optional_setting_to_none_and_is_refused_for_another():
    assert (
        config("compilation_cache=null", "phases.ppo.reward.parts.length.clip=null").compilation_cache is None
    )
    with pytest.raises(UserError, match="steps must be a whole number, got None"):
        config("steps=null")


def test_phases_are_merged_by_name_for_the_scheduler_says_which_of_them_count():
    changed = config("phases={sft: {batch_size: 2}}")
    assert list(changed.phases) == ["sft", "ppo"]
    assert (changed.phases["sft"].batch_size, changed.phases["sft"].length) == (2, 96)


def test_the_short_form_of_a_component_is_its_long_form():
    """Its name alone, its key in a collection, the default of its field: all name the same component."""
    for override in (
        "phases.ppo={name: ppo}",
        "phases.ppo=ppo",
        "scheduler=alternation",
        "scheduler={name: alternation}",
    ):
        assert config(override) == config()
    assert config("phases.ppo.kl_control.coef=0.3").phases["ppo"].kl_control.coef == 0.3
    both = config("phases.ppo.kl_control.coef=0.3", "phases.ppo.kl_control={name: fixed}")
    assert both.phases["ppo"].kl_control.coef == 0.3
    other = (
        config("phases.ppo.reward.parts.length.reward={name: repetition}").phases["ppo"].reward.parts["length"]
    )
    assert other.weight == 0.1  # another component drops the settings of the old one, and only those


def test_a_base_and_the_command_line_follow_one_rule(tmp_path):
    child = {
        "base": str(HYBRID.resolve()),
        "steps": 3,
        "phases": {"ppo": {"epochs": 5, "reward": {"parts": {"mine": {"reward": "repetition"}}}}},
        "scheduler": {"cycle": {"ppo": 1}},
    }
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    child_config = load_config(tmp_path / "child.yaml")
    assert child_config == config(
        "steps=3",
        "phases.ppo.epochs=5",
        "phases.ppo.reward.parts={mine: {reward: repetition}}",
        "scheduler.cycle={ppo: 1}",
    )
    dotted = {"base": str(HYBRID.resolve()), "phases.ppo.reward.parts.length": None, "scheduler.cycle.ppo": 2}
    (tmp_path / "dotted.yaml").write_text(yaml.safe_dump(dotted))
    assert load_config(tmp_path / "dotted.yaml") == config(
        "phases.ppo.reward.parts.length=null", "scheduler.cycle.ppo=2"
    )


def test_a_number_as_a_key_is_found_by_a_dotted_path():
    from hybrid_jax.core.config import apply_overrides
    from hybrid_jax.rewards.tokens import TokenCount

    settings = apply_overrides({"weights": {5: 1.0, 6: 1.0}}, ["weights.5=2", "weights.6=null"], TokenCount)
    assert settings == {"weights": {5: 2}}


def dataclasses_of(hint, seen):
    """Every dataclass that a config can hold, by its type hints and the registries in them."""
    hint = without_none(hint)
    if (registry := registry_of(hint)) is not None:
        for name in registry:
            dataclasses_of(registry[name], seen)
    elif dataclasses.is_dataclass(bare := without_extras(hint)) and bare not in seen:
        seen.add(bare)
        for inner in typing.get_type_hints(bare, include_extras=True).values():
            dataclasses_of(inner, seen)
    for argument in typing.get_args(without_extras(hint)):
        dataclasses_of(argument, seen)
    return seen


def test_every_mapping_in_any_setting_is_a_collection_that_a_mapping_replaces():
    found = set()
    for cls in dataclasses_of(ExperimentConfig, set()):
        place = Place(cls, EVERYTHING, to_dict)
        for field in dataclasses.fields(cls):
            child = place.child(field.name, {}) if field.init else Place(None, NOTHING, to_dict)
            if child.is_collection:
                found.add(f"{cls.__name__}.{field.name}")
                merged = merge({"old": 1}, {"new": 2}, child)
                assert merged == ({"old": 1, "new": 2} if child.merged else {"new": 2}), (cls, field.name)
            elif typing.get_origin(without_extras(child.hint)) in (dict, Mapping):
                raise AssertionError(f"{cls.__name__}.{field.name} is a mapping that is not seen as one")
    assert found >= {
        *("ExperimentConfig.phases", "CompositeReward.parts", "Alternation.cycle", "Alternation.warmup"),
        *("PPO.references", "EvaluationConfig.judges", "Lagrangian.limits", "TokenCount.weights"),
        "JsonSchema.schema",
    }, sorted(found)


WITH_BASE = [path for path in sorted(Path("configs").rglob("*.yaml")) if "\nbase:" in path.read_text()]


def says(resolved, written) -> bool:
    """Whether a resolved config holds all that a file has written, whatever else it has from its base."""
    if isinstance(written, dict):
        return all(says(resolved[key], value) for key, value in written.items())
    if isinstance(resolved, dict):
        return resolved["name"] == written
    return resolved == (float(written) if isinstance(resolved, float) else written)


@pytest.mark.parametrize("path", WITH_BASE, ids=str)
def test_a_shipped_config_with_a_base_says_what_its_file_says(path):
    settings = yaml.safe_load(path.read_text())
    base = load_yaml(path.parent / settings.pop("base"))
    for name, value in settings.items():
        if name == "model":  # of those that ship a whole one
            assert load_config(path).model == parse(ExperimentConfig, {**base, "model": value}).model
        else:
            assert says(to_dict(load_config(path))[name], value), name


def test_code_is_not_imported_to_learn_what_merges_unless_its_name_is_trusted(tmp_path, monkeypatch):
    (tmp_path / "merging_planted.py").write_text(
        "from dataclasses import dataclass, field\nfrom pathlib import Path\n"
        "Path(__file__).with_suffix('.ran').touch()\n"
        "@dataclass(frozen=True)\nclass Mine:\n    weights: dict[str, float] = field(default_factory=dict)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    old = {"name": "merging_planted:Mine", "weights": {"a": 1}}
    hint = typing.Annotated[typing.Any, Registry("thing")]
    assert merge(old, {"weights": {"b": 2}}, Place(hint, NOTHING, to_dict))["weights"] == {"a": 1, "b": 2}
    assert not (tmp_path / "merging_planted.ran").exists()
    assert merge(old, {"weights": {"b": 2}}, Place(hint, EVERYTHING, to_dict))["weights"] == {"b": 2}
