import logging
import time

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.rewards.base import evaluate_reward
from hybrid_jax.rewards.format import JsonSchema, JsonValid, Regex

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def score(reward, *responses):
    return evaluate_reward("part", reward, [""] * len(responses), responses).tolist()


def test_json_is_the_whole_response_and_strict():
    valid = ['{"a": [1, null]}', ' \n{"é": "🙂"} ', '```json\n{"a": 1}\n```', "{}"]
    invalid = ['{"a": NaN}', "{'a': 1}", '{"a": 1} and more', '{"a": 1', "", "5", "[1]", "{" * 100_000]
    assert score(JsonValid(), *valid) == [1.0] * 4
    assert score(JsonValid(), *invalid) == [0.0] * 8


def test_the_kind_of_json_and_the_fence_are_settings():
    assert score(JsonValid(kind="array"), "[1]", "{}") == [1.0, 0.0]
    assert score(JsonValid(kind="any"), "5", "[" * 100_000, "null") == [1.0, 0.0, 1.0]
    assert score(JsonValid(fenced=False), '```json\n{"a": 1}\n```') == [0.0]


def test_a_schema_decides():
    good, bad = (
        '{"name": "Ann", "age": 3}',
        ['{"age": 3}', '{"name": "Ann", "age": -1}', '{"name": 1}', "Ann", ""],
    )
    assert score(JsonSchema(PERSON), good, *bad) == [1.0, *[0.0] * 5]


def test_a_schema_that_is_none_or_lies_elsewhere_is_one_line(monkeypatch):
    fetched = []
    monkeypatch.setattr("urllib.request.urlopen", fetched.append)
    with pytest.raises(UserError, match=r"schema must be a JSON schema: 'objekt' is not valid"):
        parse(JsonSchema, {"schema": {"type": "objekt"}})
    with pytest.raises(UserError, match=r"the reference 'http://localhost:1/x' is not within the schema"):
        score(JsonSchema({"$ref": "http://localhost:1/x"}), "{}")
    assert fetched == []


def test_a_recursive_schema_meets_a_deep_answer():
    nested = {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    assert score(JsonSchema(nested), "[[[]]]", "[" * 900 + "]" * 900) == [1.0, 0.0]


def test_a_pattern_must_match_all_or_any_part():
    assert score(Regex(r"Answer: \d+"), "Answer: 42", "So: Answer: 42", "Answer: x") == [1.0, 0.0, 0.0]
    assert score(Regex(r"Answer: \d+", match="search"), "So: Answer: 42.", "") == [1.0, 0.0]
    assert score(Regex(r"(?s)<think>.*</think>.+"), "<think>a\nb</think>c", "<think>a</think>") == [1.0, 0.0]


def test_a_pattern_that_would_take_for_ever_is_stopped_and_said(caplog):
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="hybrid_jax"):
        assert score(Regex("(a|aa)+!?", timeout_seconds=0.1), "a" * 60 + "b", "aaa!") == [0.0, 1.0]
    assert time.monotonic() - start < 2
    assert "took more than 0.1 s on a response of 61 characters, which scores 0" in caplog.text


SLOW = "^(a|aa)+$"  # exponential time on many a and a b


@pytest.mark.parametrize(
    ("schema", "slow", "good"),
    [
        ({"pattern": SLOW}, '"{}"', '"aaa"'),
        ({"patternProperties": {SLOW: {}}}, '{{"{}": 1}}', '{"aaa": 1}'),
        ({"patternProperties": {SLOW: {}}, "additionalProperties": False}, '{{"{}": 1}}', '{"aaa": 1}'),
        ({"patternProperties": {SLOW: {}}, "unevaluatedProperties": False}, '{{"{}": 1}}', '{"aaa": 1}'),
        ({"propertyNames": {"pattern": SLOW}}, '{{"{}": 1}}', '{"aaa": 1}'),
    ],
)
def test_a_schema_that_would_take_for_ever_is_stopped_and_said(caplog, schema, slow, good):
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="hybrid_jax"):
        reward = JsonSchema(schema, timeout_seconds=0.1)
        assert score(reward, slow.format("a" * 60 + "b"), good) == [0.0, 1.0]
    assert time.monotonic() - start < 2
    assert "json_schema: the schema took more than 0.1 s on a response, which scores 0" in caplog.text


def test_a_schema_of_choices_of_choices_is_stopped():
    levels = {f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{i - 1}"}] * 2} for i in range(1, 40)}
    schema = {"$defs": {"n0": {"type": "string"}, **levels}, "$ref": "#/$defs/n39"}
    start = time.monotonic()
    assert score(JsonSchema(schema, timeout_seconds=0.1), "1", '"a"') == [0.0, 1.0]
    assert time.monotonic() - start < 2


def test_patterns_of_names_decide_as_in_jsonschema():
    reward = JsonSchema(
        {
            "properties": {"id": {"type": "integer"}},
            "patternProperties": {"^x_": {"type": "string"}},
            "additionalProperties": {"type": "null"},
        }
    )
    responses = ['{"id": 1, "x_a": "b", "c": null}', '{"x_a": 1}', '{"c": 1}', '{"id": "a"}', "[1]"]
    assert score(reward, *responses) == [1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "settings", "said"),
    [
        (JsonSchema, {"schema": {"pattern": "(a"}}, r"schema must be a JSON schema: '\(a' is not a 'regex'"),
        (JsonSchema, {"schema": {"patternProperties": {"(a": {}}}}, r"'\(a' is not a 'regex'"),
        (Regex, {"pattern": "(a"}, r"pattern must be a regular expression, got '\(a'"),
        (Regex, {"pattern": "a", "timeout_seconds": 0}, r"timeout_seconds must be in \(0, 86400\], got 0"),
        (Regex, {}, "pattern is missing"),
        (JsonValid, {"kind": "list"}, "kind must be one of object, array, any, got 'list'"),
    ],
)
def test_impossible_settings_are_refused(reward, settings, said):
    with pytest.raises(UserError, match=said):
        parse(reward, settings)
