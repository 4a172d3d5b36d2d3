import json
import subprocess
import sys

import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.conversations import Chat
from hybrid_jax.data.listed import Listed
from hybrid_jax.data.messages import check_messages


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}


def load(tmp_path, *rows, split="train", **settings):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Chat(train=path, **settings).load(split)


def test_a_row_of_messages_is_a_conversation_with_its_last_question_and_answer(tmp_path):
    messages = [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
    (example,) = load(tmp_path, {"messages": messages, "label": 3, "prompt": "a"})
    asked = messages[:4]
    columns = {"label": 3, "prompt": "a", "messages": asked}
    assert example == Example("c", "d", columns, tuple(messages))
    assert list(example.question) == asked
    assert example.texts == ["Be brief.", "a", "b", "c", "d"]


def test_a_conversation_that_ends_with_a_question_has_no_response(tmp_path):
    messages = [user("a"), assistant("b"), user("c")]
    (example,) = load(tmp_path, {"messages": messages})
    assert (example.prompt, example.response, list(example.question)) == ("c", None, messages)


@pytest.mark.parametrize("field", ["completion", "response"])
def test_prompt_and_answer_may_be_messages_or_texts(field, tmp_path):
    rows = [
        {"prompt": [SYSTEM, user("a")], field: [assistant("b")]},
        {"prompt": "a", field: "b"},
        {"prompt": [user("a")]},
    ]
    lists, texts, alone = load(tmp_path, *rows)
    assert lists == Example("a", "b", {"messages": [SYSTEM, user("a")]}, (SYSTEM, user("a"), assistant("b")))
    assert texts == Example("a", "b", {"messages": [user("a")]}, (user("a"), assistant("b")))
    assert alone == Example("a", None, {"messages": [user("a")]}, (user("a"),))


def test_messages_may_have_another_field_and_further_keys_but_no_empty_ones(tmp_path):
    call = {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": None}
    (example,) = load(tmp_path, {"turns": [user("a"), call]}, messages_field="turns")
    assert example.messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    assert set(example.columns) == {"messages"}


def test_conversations_are_held_out_by_all_that_is_asked(tmp_path):
    rows = [
        {"messages": [user(f"topic {i % 10}"), assistant("ok"), user("go on"), assistant(f"{i}")]}
        for i in range(40)
    ]
    train = load(tmp_path, *rows, held_out_fraction=0.3)
    held_out = load(tmp_path, *rows, held_out_fraction=0.3, split="held_out")
    assert (len(train), len(held_out)) == (28, 12)  # by the last question alone, all would be one
    assert {e.messages[0]["content"] for e in train}.isdisjoint(e.messages[0]["content"] for e in held_out)


def test_a_held_out_file_is_its_own(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"messages": [user("x"), assistant("y")]}))
    (example,) = load(tmp_path, {"messages": [user("a"), assistant("b")]}, held_out=other, split="held_out")
    assert example.prompt == "x"
    with pytest.raises(UserError, match="has no held-out data; set held_out"):
        load(tmp_path, {"messages": [user("a"), assistant("b")]}, split="held_out")
    with pytest.raises(UserError, match=r"data\.held_out must be alone, got held_out and held_out_fraction"):
        parse(Chat, {"train": "a", "held_out": "b", "held_out_fraction": 0.1}, "data")


def test_a_saved_dataset_and_a_folder_of_files_are_read(tmp_path):
    import datasets

    rows = [
        {"messages": [user("a"), assistant("b")], "n": 1},
        {"messages": [user("c"), assistant("d")], "n": 2},
    ]
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    )
    saved.save_to_disk(tmp_path / "saved")
    source = Chat(train=tmp_path / "saved", held_out_split="test")
    assert [example.messages for example in source.load("train")] == [tuple(row["messages"]) for row in rows]
    assert [example.prompt for example in source.load("held_out")] == ["a"]
    bad = datasets.Dataset.from_list([{"messages": [user("a"), {"role": "bot", "content": "b"}]}])
    bad.save_to_disk(tmp_path / "bad")
    with pytest.raises(UserError, match=r"bad, row 1: messages\[1\]\.role is 'bot'"):
        Chat(train=tmp_path / "bad").load("train")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, r"no field 'messages' and no 'prompt'; fields: text"),
        ({"messages": "hello"}, r"'messages' must be a list of messages, got 'hello'"),
        ({"messages": []}, r"'messages' must be a list of messages, got \[\]"),
        ({"messages": ["a"]}, r"messages\[0\] must be \{role: …, content: …\}, got 'a'"),
        ({"messages": [{"from": "human", "content": "a"}]}, r"messages\[0\] has no 'role'; known: content"),
        ({"messages": [{"role": "user", "contents": "a"}]}, r"no 'content'; did you mean 'contents'"),
        ({"messages": [user("a"), {"role": "asistant", "content": "b"}]}, r"'asistant'; did you mean 'assist"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\]\.text must be a text"),
        ({"messages": [{"role": "system", "content": "a"}]}, r"neither an answer to learn nor a user's"),
        ({"prompt": [user("a")], "completion": [{"role": "user"}]}, r"completion\[0\] has no 'content'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_a_wrong_row_is_one_line_with_its_place_what_it_is_and_what_it_must_be(row, problem, tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}/chat\.jsonl:2: .*{problem}"):
        load(tmp_path, {"messages": [user("a"), assistant("b")]}, row)


def test_a_conversation_may_begin_with_the_assistant(tmp_path):
    greeting, system = assistant("Hi, I am a bot"), {"role": "system", "content": "be brief"}
    rows = [[greeting, user("b"), assistant("c")], [system, greeting], [greeting], [greeting, user("b")]]
    found = load(tmp_path, *({"messages": row} for row in rows))
    assert [len(example.question) for example in found] == [2, 1, 0, 2]
    assert [example.prompt for example in found] == ["b", "be brief", "", "b"]
    assert [example.response for example in found] == ["c", "Hi, I am a bot", "Hi, I am a bot", None]


def test_a_list_given_from_python_may_hold_conversations():
    listed = Listed.of([{"messages": [user("a"), assistant("b")]}, {"prompt": "c", "completion": "d"}])
    assert {example.prompt for split in ("train", "held_out") for example in listed.load(split)} == {"a", "c"}
    assert check_messages([user("a")], "here") == (user("a"),)
    with pytest.raises(UserError, match=r"^data\[0\]: messages\[0\]\.role is 'usr'"):
        Listed.of([{"messages": [{"role": "usr", "content": "a"}]}])


def test_reading_conversations_never_imports_transformers(tmp_path):
    load(tmp_path, {"messages": [user("a"), assistant("b")]})
    program = (
        "import sys; from hybrid_jax.data.conversations import Chat\n"
        "Chat(train=sys.argv[1]).load('train')\n"
        "assert not {'transformers', 'datasets', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "chat.jsonl")], check=True)
