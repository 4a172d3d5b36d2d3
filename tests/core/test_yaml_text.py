import os

import pytest
import yaml

from hybrid_jax.core.config import apply_overrides, load_yaml, parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.core.yaml_text import MOST_BYTES, dump_yaml, parse_yaml, read_yaml
from hybrid_jax.experiment import load_config

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def aliases_of(first: str, form: str) -> str:
    """Ten lines, each of which repeats the one before nine times: 9**10 values."""
    lines = [f"a: &a {first}"]
    for one, other in zip(LETTERS[1:10], LETTERS, strict=False):
        lines.append(f"{one}: &{one} " + form.format(", ".join([f"*{other}"] * 9)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30", "1:30"),
        ("010", "010"),
        ("007.5", "007.5"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("no", "no"),
        ("{on: yes, off: y}", {"on": "yes", "off": "y"}),
        ("=", "="),
        ("1e-4", 0.0001),
        ("-1.5E+3", -1500.0),
        ("[.5, 5., +5, -0, 0x1f, 0o17]", [0.5, 5.0, 5, 0, 31, 15]),
        ("[true, False, null, ~]", [True, False, None, None]),
        ("!!str 5", "5"),
        ("{a: &a {x: 1, y: 1}, b: {<<: *a, x: 2}}", {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}}),
        ("\ufeffa: 1", {"a": 1}),
    ],
)
def test_a_plain_value_means_what_it_says_and_else_it_is_a_text(text, value):
    assert parse_yaml(text, "here") == value
    assert type(parse_yaml(text, "here")) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1}\na: 2", "here line 3: the key 'a' is there twice"),
        ("b:\n  2: 1\n  '2': 2", "here line 3: the key '2' is there twice"),
        ("a: 1\n? [b]\n: 1", "here line 2: a key must be a word"),
        ("a: " + "9" * 400, "here line 1: a whole number must have at most 63 bits, got 400 digits"),
        ("a: " + "9" * 5000, "here line 1: a whole number must have at most 63 bits, got 5000 digits"),
        ("a: 9223372036854775808", "here line 1: a whole number must have at most 63 bits, got 19 digits"),
        ("a: 1e400", "here line 1: 1e400 is too large a number"),
        (aliases_of("[x]", "[{}]"), "aliases make more than 30,000 values or 50 levels of it"),
        (aliases_of("{x: 1}", "{{<<: [{}]}}"), "aliases make more than 30,000 values or"),
        ("\n".join(f"k{i}: &a{i} [{f'*a{i - 1}' if i else ''}]" for i in range(99)), "50 levels of it"),
        ("a: &a [*a]", "here line 1: an alias holds itself"),
        ("a: " + "[" * 20_000, "here line 1: nested deeper than 50 levels"),
        ("a: " + "{a: " * 20_000, "here line 1: nested deeper than 50 levels"),
        ("- " * 20_000 + "x", "here line 1: nested deeper than 50 levels"),
        ("a:\n" + "- 1\n" * 30_001, "here line 30000: more than 30,000 values"),
        ("a: !!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd is not read"),
        ("a: !!int x", "here line 1: the tag !!int is not read"),
        ("a: !!set {x}", "here line 1: the tag !!set is not read"),
        ("a: !!binary x", "here line 1: the tag !!binary is not read"),
        ('a: "\\U00110000"', "here: not YAML: chr() arg not in range(0x110000)"),
        ("a: 1\n---\nb: 2", "here line 2: not YAML: but found another document"),
    ],
)
def test_what_is_ambiguous_or_without_bound_is_one_line_with_its_place(text, message):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "here")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_is_written_reads_back_also_by_others():
    texts = [
        "1e-4",
        "010",
        "no",
        "2026-01-01",
        "0o17",
        "1:30",
        "1_0",
        "~",
        "<<",
        "=",
        "5.",
        "",
        "\ud800é",
        "1e400",
    ]
    settings = {"texts": texts, "numbers": [1e-5, 1e22, -3, float("inf"), True, None]}
    assert parse_yaml(dump_yaml(settings), "") == settings
    assert parse_yaml(dump_yaml({"a": "é"}, unicode=True), "") == {"a": "é"}
    assert yaml.safe_load(dump_yaml(settings))["texts"] == texts


def test_a_config_is_a_regular_file_of_a_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"config file '.*pipe' is a pipe; expected a regular file"):
        read_yaml(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"config file '/dev/zero' is a device"):
        load_yaml("/dev/zero")
    (tmp_path / "base.yaml").write_text("base: pipe\nsteps: 1\n")
    with pytest.raises(UserError, match=r"pipe' is a pipe"):
        load_yaml(tmp_path / "base.yaml")
    with (tmp_path / "large").open("wb") as sparse:
        sparse.truncate(MOST_BYTES + 1)
    with pytest.raises(UserError, match=r"config file '.*large' must have at most 1 MiB"):
        read_yaml(tmp_path / "large")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=1:30", "steps must be a whole number, got '1:30'"),
        ("steps=010", "steps must be a whole number, got '010'"),
        ("steps=1_000", "steps must be a whole number, got '1_000'"),
        (
            "steps=" + "9" * 400,
            "override 'steps' line 1: a whole number must have at most 63 bits, got 400 digits",
        ),
        ("phases.sft.optimizer.learning_rate=1_0.0", "learning_rate must be a number, got '1_0.0'"),
        ("phases.sft.optimizer.learning_rate='nan'", "learning_rate must be a number, got 'nan'"),
        ("share_optimizer_state=yes", "share_optimizer_state must be true or false, got 'yes'"),
        ("run_dir=2026", "run_dir must be a path or a URL, got 2026; in quotes it is a text"),
        ("data.train=1.5", "data.train must be a path, got 1.5; in quotes it is a text"),
        ("steps=[", "override 'steps' line 1: not YAML: "),
        ("model={name: decoder, name: x}", "override 'model' line 1: the key 'name' is there twice"),
        ("seed=4294967296", "seed must be in [0, 4294967295], got 4294967296"),
        ("seed=-1", "seed must be in [0, 4294967295], got -1"),
    ],
)
def test_a_setting_refuses_what_yaml_of_old_would_have_turned_into_another_value(override, message):
    with pytest.raises(UserError) as caught:
        load_config("configs/debug/chat.yaml", [override])
    assert message in str(caught.value)


def test_a_number_that_is_given_from_python_is_bounded_too():
    from hybrid_jax.experiment import ExperimentConfig

    settings = load_yaml("configs/debug/hybrid.yaml")
    for name, value, message in [
        ("seed", 10**30, "seed must have at most 63 bits, got 100"),
        ("steps", 10**5000, "steps must have at most 63 bits, got 16610"),
        ("peak_tflops", 10**400, "peak_tflops must be a number, got 1000"),
        ("peak_tflops", "1_0", "peak_tflops must be a number, got '1_0'"),
    ]:
        with pytest.raises(UserError) as caught:
            parse(ExperimentConfig, {**settings, name: value})
        assert message in str(caught.value)
        assert len(str(caught.value)) < 300
    assert parse(ExperimentConfig, {**settings, "peak_tflops": "1e2"}).peak_tflops == 100.0
    assert apply_overrides({}, ["a.b=1e2"]) == {"a": {"b": 100.0}}
