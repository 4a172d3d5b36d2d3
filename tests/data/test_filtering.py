import json
import logging

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import Untrusted, UserError
from hybrid_jax.core.registry import EVERYTHING
from hybrid_jax.data.conversations import Chat
from hybrid_jax.data.e2e import E2E
from hybrid_jax.data.filtering import Filtered
from hybrid_jax.data.labelled import Labelled
from hybrid_jax.data.preferences import PREFERENCES, JsonlPreferences
from hybrid_jax.data.sources import SOURCES, HuggingFaceDataset, Jsonl, Restaurants, Text

ROWS = [
    {"prompt": "one", "completion": "a b c", "kind": "x", "n": 1},
    {"prompt": "two", "completion": "a b", "kind": "y", "n": 1.0},
    {"prompt": "three", "completion": "", "kind": "x", "n": True},
    {"prompt": "four", "completion": None, "kind": "z"},
    {"prompt": "five", "completion": "ab\ncd", "kind": None, "n": 2},
]


def write(tmp_path, rows=ROWS):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def kept(tmp_path, *conditions, rows=ROWS):
    path = write(tmp_path, rows)
    source = parse(
        Jsonl, {"train": str(path), "response_field": None, "filter": list(conditions)}, "data", EVERYTHING
    )
    return [example.prompt for example in source.load("train")]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"name": "length", "column": "completion", "least": 5}, ["one", "five"]),
        ({"name": "length", "column": "completion", "most": 4}, ["two", "three", "four"]),
        ({"name": "length", "column": "completion", "least": 2, "most": 2, "unit": "words"}, ["two", "five"]),
        ({"name": "one_of", "column": "kind", "values": ["x", None]}, ["one", "three", "five"]),
        ({"name": "one_of", "column": "kind", "values": ["x"], "keep": False}, ["two", "four", "five"]),
        ({"name": "one_of", "column": "n", "values": [1]}, ["one", "two"]),
        ({"name": "one_of", "column": "n", "values": [True]}, ["three"]),
        ({"name": "pattern", "column": "completion", "pattern": "^a b$"}, ["two"]),
        ({"name": "pattern", "column": "completion", "pattern": "b|^$"}, ["one", "two", "three", "five"]),
    ],
)
def test_each_condition_keeps_the_rows_that_it_names(condition, expected, tmp_path):
    assert kept(tmp_path, condition) == expected


def test_the_length_of_a_conversation_is_that_of_its_texts_and_its_items_are_messages(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]}
        for n in (1, 5)
    ] + [{"messages": [{"role": "user", "content": [{"type": "text", "text": "abcd"}]}]}]
    path = write(tmp_path, rows)

    def lengths(**settings):
        rule = {"name": "length", "column": "messages", **settings}
        source = parse(Chat, {"train": str(path), "filter": [rule]}, "data")
        return [len(example.prompt) for example in source.load("train")]

    assert lengths(most=2) == [1]
    assert lengths(least=4) == [5, 4]
    assert lengths(unit="items", least=2) == [1, 5]


def test_the_log_counts_what_each_condition_left_out_and_rows_keep_their_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path)
    conditions = [
        {"name": "length", "column": "completion", "least": 1},
        {"name": "one_of", "column": "kind", "values": ["x", "y"]},
    ]
    source = parse(Jsonl, {"train": str(path), "filter": conditions}, "data")
    assert [example.where for example in source.load("train")] == [f"{path}:1", f"{path}:2"]
    assert caplog.messages == [
        f"filter kept 2 of 5 rows of {path}, left out 2 by length of 'completion', 1 by one_of of 'kind'"
    ]


def long_prompts(row):
    return len(row["prompt"]) > 3


def no_answer(row):
    return None


def test_a_function_of_the_users_own_filters_only_from_a_config_that_the_user_gave(tmp_path):
    name = f"{__name__}:long_prompts"
    assert kept(tmp_path, name) == ["three", "four", "five"]
    with pytest.raises(Untrusted, match="runs code of its own"):
        parse(Jsonl, {"train": "a", "filter": [name]}, "data")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: filter\[0\] must return true or false, got null"):
        kept(tmp_path, f"{__name__}:no_answer")


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ({"name": "length", "column": "completions", "least": 1},
         r"filter\[0\]\.column: no row of .* has 'completions'; did you mean 'completion'"),
        ({"name": "length", "column": "n", "least": 1}, r":1: filter\[0\]: the length of a text .* got 1$"),
        ({"name": "pattern", "column": "n", "pattern": "a"}, r":1: filter\[0\]: a pattern needs a text in"),
        ({"name": "pattern", "column": "prompt", "pattern": "(a"}, r"filter\[0\]\.pattern must be a regular"),
        ({"name": "length", "column": "prompt"}, r"filter\[0\]\.least must be at least 1 where"),
        ({"name": "length", "column": "prompt", "least": 3, "most": 2}, "least must be at most most = 2"),
        ({"name": "one_of", "column": "prompt", "values": []}, "values must not be empty"),
        ({"name": "one_of", "column": "prompt", "values": ["six"]}, "kept 0 of 5 rows .*; loosen a condition"),
    ],
)  # fmt: skip
def test_a_wrong_condition_is_one_line(condition, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        kept(tmp_path, condition)


def test_a_pattern_that_never_ends_is_stopped(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: filter\[0\]: the pattern .* takes more than 1 s"):
        kept(
            tmp_path,
            {"name": "pattern", "column": "prompt", "pattern": "(a|aa)+$"},
            rows=[{"prompt": "a" * 60 + "b"}],
        )


def test_every_source_of_rows_filters_both_splits(tmp_path):
    for registry in (SOURCES, PREFERENCES):
        for name in registry:
            assert issubclass(registry[name], Filtered) or name == "preferences", name  # it has source.filter
    texts = tmp_path / "text.txt"
    texts.write_text("aa\nb\ncc\ndd\n")
    rows = write(tmp_path, [{"prompt": f"p{n}", "completion": f"c{n}", "text": f"t{n}", "chosen": "a",
                             "rejected": "b", "keep": n % 2 == 0} for n in range(40)])  # fmt: skip
    rule = {"name": "one_of", "column": "keep", "values": [True]}
    share = {"train": str(rows), "held_out_fraction": 0.25, "filter": [rule]}
    for source in (Jsonl, Labelled, E2E, JsonlPreferences, Chat):
        loaded = parse(source, share, "data")
        train, held_out = loaded.load("train"), loaded.load("held_out")
        assert (len(train), len(held_out)) == (15, 5)
        assert all(row.columns["keep"] for row in [*train, *held_out])
    table = {"path": "json", "data_files": {"train": str(rows)}, "held_out_fraction": 0.25, "filter": [rule]}
    assert len(parse(HuggingFaceDataset, table, "data").load("train")) == 15
    lines = {"train": str(texts), "lines": True, "filter": [{"name": "length", "column": "text", "least": 2}]}
    assert [e.response for e in parse(Text, lines, "data").load("train")] == ["aa", "cc", "dd"]
    short = {"filter": [{"name": "length", "column": "completion", "most": 40}]}
    assert 0 < len(parse(Restaurants, short, "data").load("train")) < len(Restaurants().load("train"))
