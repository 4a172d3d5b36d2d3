"""The forms in which data sets write messages: each is read as the one form that chat templates take."""

import json
from pathlib import Path

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.conversations import Chat
from hybrid_jax.data.messages import check_messages
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.data.preference_stream import PreferenceStream, Reading
from hybrid_jax.data.preferences import JsonlPreferences, Preference
from hybrid_jax.data.tokenizer import Bytes

ASK = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def load(tmp_path, *rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return parse(Chat, {"train": str(path), **settings}, "data").load("train")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], [ASK, ANSWER]),
        ([{"from": "system", "value": "Be brief."}, {"from": "user", "value": "2 + 2?"}],
         [{"role": "system", "content": "Be brief."}, ASK]),
        (json.dumps([ASK, ANSWER]), [ASK, ANSWER]),
        ([{"role": "human", "content": "2 + 2?"}, {"role": "model", "content": "4"}], [ASK, ANSWER]),
        ([{"role": "user", "content": [{"type": "text", "text": "2 "}, {"text": "+ 2?"}]}], [ASK]),
        ([{"role": "user", "content": [{"type": "text", "text": "2 + 2?", "image": None}]}], [ASK]),
        ([ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}], [ASK, CALLING]),
        ([ASK, {"role": "assistant", "tool_calls": [CALL]}], [ASK, CALLING]),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}], [ASK, CALLING]),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]}],
         [ASK, CALLING]),
        ([ASK, {"role": "assistant", "content": None, "function_call": {
            "name": "add", "arguments": '{"a": 2, "b": 2}'}}], [ASK, CALLING]),
        ([{"from": "human", "value": "2 + 2?"},
          {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
          {"from": "observation", "value": "4"}], [ASK, CALLING, {"role": "tool", "content": "4"}]),
        ([ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": ""}]}],
         [ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": {}}]}]),
        ([ASK, {**ANSWER, "tool_calls": []}], [ASK, ANSWER]),
        ([ASK, {**ANSWER, "train": False}], [ASK, {**ANSWER, "train": False}]),
        ([ASK, {**ANSWER, "weight": 0.0}], [ASK, {**ANSWER, "train": False}]),
        ([{**ASK, "weight": 0}, {**ANSWER, "weight": 1, "train": True}], [ASK, ANSWER]),
    ],
)  # fmt: skip
def test_each_form_is_read_as_the_one_that_templates_take(written, read):
    assert list(check_messages(written, "here")) == read


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "a"}]},
         r"content\[0\] is of type 'image'; only texts are read: leave out such rows by data\.filter"),
        ({"role": "user", "content": ["a"]}, r"content\[0\] must be \{type: text, text: …\}, got 'a'"),
        ({"role": "user", "content": []}, r"content must be a text, got \[\]"),
        ({"role": "assistant", "content": None}, "content must be a text, got null"),
        ({"role": "assistant", "tool_calls": "[{"}, r"\.tool_calls: not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, r"\[0\] must be \{type"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
         r"tool_calls\[0\]\.arguments must be an object or its JSON, got '\[1\]'"),
        ({"role": "assistant", "tool_calls": [CALL], "function_call": {}}, "has 'tool_calls' and 'function"),
        ({**ASK, "tool_calls": [CALL]}, "tool_calls must be of the assistant, got 'user'"),
        ({"from": "function_call", "value": "add 2 and 2"}, r"\.value: not JSON"),
        ({**ANSWER, "weight": 0.5}, r"weight must be 0 \(only read\) or 1 \(learned\), got 0\.5"),
        ({**ANSWER, "train": 0}, "train must be true or false, got 0"),
        ({**ANSWER, "train": True, "weight": 0}, "has train true and weight 0; keep one"),
        ({**ASK, "train": True}, "only answers are learned"),
        ({"role": "bot", "content": "a"}, "role is 'bot'"),
    ],
)  # fmt: skip
def test_what_is_no_message_for_certain_is_one_line(message, problem):
    with pytest.raises(UserError, match=rf"^here: messages\[0\].*{problem}"):
        check_messages([message], "here")


def test_what_a_template_reads_beside_the_messages_comes_from_the_row_and_then_from_the_settings(tmp_path):
    row = {"messages": [ASK, ANSWER], "tools": [TOOL], "documents": [{"title": "t", "text": "x"}],
           "chat_template_kwargs": {"enable_thinking": True, "effort": None}, "label": 3}  # fmt: skip
    plain = {"conversations": [{"from": "human", "value": "a"}], "functions": [{"name": "add"}]}
    settings = {"chat_template_kwargs": {"enable_thinking": False, "style": "short"}}
    first, second = load(tmp_path, row, plain, **settings)
    documents = [{"title": "t", "text": "x"}]
    variables = {"enable_thinking": True, "style": "short", "tools": [TOOL], "documents": documents}
    assert first.template_variables == variables
    assert first.columns == {"tools": [TOOL], "documents": documents, "label": 3, "messages": [ASK]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert second.template_variables == {"enable_thinking": False, "style": "short", "tools": tools}
    as_text = {**row, "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"enable_thinking": true}'}
    assert load(tmp_path, as_text, **settings) == [first]
    (alone,) = load(tmp_path, {**row, "chat_template_kwargs": None}, tools_field=None, documents_field=None)
    assert alone.template_variables == {}
    assert alone.columns["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tools": "weather"}, r"rows\.jsonl:1: tools: not JSON"),
        (
            {"tools": ["weather"]},
            "'tools' must be a list of objects, or the JSON of one, got .*tools_field",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping of names to values"),
        (
            {"chat_template_kwargs": {"messages": []}},
            "must not name 'messages', which",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "must not name 'tools', .*; put it into the column 'tools'"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "must not name 'add_generation_prompt'"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "must not name 'eos_token'"),
        ({"chat_template_kwargs": {"a b": 1}}, "must name variables of a template, got 'a b'"),
    ],
)
def test_what_a_template_may_not_be_given_is_one_line(fields, problem, tmp_path):
    with pytest.raises(UserError, match=problem):
        load(tmp_path, {"messages": [ASK, ANSWER], **fields})
    if isinstance(fields.get("chat_template_kwargs"), dict):
        with pytest.raises(UserError, match=r"^data\.chat_template_kwargs must"):
            parse(Chat, {"train": "a", **fields}, "data")


def test_the_same_rows_as_json_lines_and_as_parquet_are_the_same_examples(tmp_path):
    datasets = pytest.importorskip("datasets")

    def tool(name, **properties):
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    def calling(name, arguments):
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": {
            "name": name, "arguments": arguments}}]}  # fmt: skip

    rows = [
        {"messages": [ASK, calling("add", {"a": 2, "b": 2}), {"role": "tool", "content": "4"}, ANSWER],
         "tools": [tool("add", a={"type": "integer"}, b={"type": "integer"})]},
        {"messages": [ASK, calling("find", {"where": {"city": "Rome"}, "most": 3})],
         "tools": [tool("find", where={"type": "object", "description": "a place"})]},
        {"messages": [ASK, {**ANSWER, "train": False}]},
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (given,) = datasets.Dataset.from_list(rows).select([0])
    assert given["tools"][0]["function"]["parameters"]["properties"]["where"] is None  # what Arrow adds
    lines = load(tmp_path, *rows)
    assert Chat(train=tmp_path / "rows.parquet").load("train") == lines
    assert Chat(train=tmp_path / "saved").load("train") == lines
    assert lines[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": 2}
    assert lines[0].template_variables == {"tools": rows[0]["tools"]}
    assert json.dumps(lines[1].template_variables) == json.dumps({"tools": rows[1]["tools"]})
    assert lines[2].template_variables == {}


def test_a_null_is_kept_where_arguments_or_schemas_are_given_as_json(tmp_path):
    call = {"name": "find", "arguments": '{"city": null}'}
    schema = '[{"name": "find", "default": null}]'
    (example,) = load(
        tmp_path, {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}], "tools": schema}
    )
    assert example.messages[1]["tool_calls"] == [{"name": "find", "arguments": {"city": None}}]
    assert example.template_variables == {"tools": [{"name": "find", "default": None}]}


def test_a_date_that_arrow_read_out_of_a_text_is_refused():
    import datetime

    call = {"name": "f", "arguments": {"day": datetime.datetime(2024, 1, 1)}}
    with pytest.raises(UserError, match=r"tool_calls\[0\]\.arguments\.day must be a value that JSON has"):
        check_messages([{"role": "assistant", "tool_calls": [call]}], "here")


def test_preferences_keep_what_their_template_reads_and_a_reward_model_refuses_it(tmp_path):
    row = {"messages": [ASK], "chosen": "4", "rejected": "5", "tools": [TOOL],
           "chat_template_kwargs": {"enable_thinking": False}}  # fmt: skip
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row], indent=1))
    (preference,) = JsonlPreferences(train=path).load("train")
    variables = {"tools": [TOOL], "enable_thinking": False}
    assert preference.template_variables == preference.example.template_variables == variables
    assert preference.columns == {"tools": [TOOL]}
    assert Preference.of(preference.example) == preference
    tokenizer = Bytes(chat_template="chatml").build([])
    with pytest.raises(UserError, match=r"row 1: a reward model reads messages alone, got also enable"):
        PreferenceStream([preference], tokenizer, Reading(prompt=True, max_length=64, chat=True))


def test_prompts_alone_bring_what_their_template_reads(tmp_path):
    (example,) = load(tmp_path, {"prompt": [ASK], "tools": [TOOL]})
    assert example.response is None
    assert example.template_variables == {"tools": [TOOL]}
    assert Path(example.where).name == "rows.jsonl:1"


def test_a_call_without_words_is_no_empty_answer(tmp_path, caplog):
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = Bytes(chat_template=str(template)).build([])
    calling, silent = load(
        tmp_path, {"messages": [ASK, CALLING]}, {"messages": [ASK, {**ANSWER, "content": ""}]}
    )
    encode_examples([calling], tokenizer, None)
    assert caplog.messages == []
    encode_examples([silent], tokenizer, None)
    assert "have an empty response" in caplog.text
