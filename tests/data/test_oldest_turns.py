"""Conversations cut between turns, against a loop that tries every cut and rendered texts."""

import json
from itertools import chain

import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.conversations import Chat
from hybrid_jax.data.loader import PromptStream
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.oldest_turns import Turns, one_turn_each
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.data.tokenizer import Bytes

END = "<|endoftext|>"
TOKENIZER = Bytes(chat_template="plain").build()


def said(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


SYSTEM = said("system", "Be brief.")
TURNS = [
    [said("user", f"Question {n}{'?' * (n % 3)}"), said("assistant", f"Answer {n}{'!' * (7 - n)}")]
    for n in range(7)
]


def chat(*turns, head=(SYSTEM,), **more) -> Example:
    messages = (*head, *(message for turn in turns for message in turn))
    return Example("x", "y", messages=messages, **more)


def written(messages) -> str:
    """The rendering, by hand."""
    return "".join(
        f"Assistant: {m['content']}{END}\n"
        if m["role"] == "assistant"
        else f"{m['role'].capitalize()}: {m['content']}\n"
        for m in messages
    )


def length(messages) -> int:
    """Tokens: the end token is one of them."""
    return len(written(messages)) - written(messages).count(END) * (len(END) - 1)


def parts_by_hand(head, turns, most):
    """The last turns that fit, then the last of those before them, and so on; the first part first."""
    parts, last = [], len(turns)
    while last:
        fitting = [first for first in range(last) if length([*head, *chain(*turns[first:last])]) <= most]
        if fitting:
            parts.insert(0, [*head, *chain(*turns[fitting[0] : last])])
        last = fitting[0] if fitting else last - 1
    return parts


@pytest.mark.parametrize("most", [70, 90, 115, 150, 200, 270])
@pytest.mark.parametrize("head", [(), (SYSTEM,)])
def test_a_long_conversation_is_cut_between_turns_into_rows_that_each_keep_what_the_system_says(most, head):
    rows = encode_examples([chat(*TURNS, head=head)], TOKENIZER, most, LongRows("drop_turns"))
    expected = parts_by_hand(head, TURNS, most)
    texts = [TOKENIZER._backend.decode(row.tokens.tolist(), skip_special_tokens=False) for row in rows]
    assert texts == [written(part) for part in expected]
    for row, part in zip(rows, expected, strict=True):
        assert len(row.tokens) <= most
        answers = "".join(f" {m['content']}" for m in part if m["role"] == "assistant")
        assert TOKENIZER.decode(row.tokens[row.loss_mask]) == answers
    learned = sum(int(row.loss_mask.sum()) for row in rows)
    assert learned == sum(len(turn[1]["content"]) + 2 for turn in TURNS)  # a space and the end token: each once


def test_a_conversation_that_fits_is_one_row_and_other_long_rows_are_left_out(caplog):
    short, pair = chat(*TURNS[:2], where="a.jsonl:1"), Example("ab" * 60, "c", where="a.jsonl:2")
    long = chat(*TURNS[:5], where="a.jsonl:3")
    alone = chat([said("user", "x" * 150), said("assistant", "y")], where="a.jsonl:4")
    odd = chat(TURNS[0], [said("user", "x" * 150), said("assistant", "y")], TURNS[1], where="a.jsonl:5")
    rows = encode_examples([short, pair, long, alone, odd], TOKENIZER, 115, LongRows("drop_turns"))
    texts = [TOKENIZER._backend.decode(row.tokens.tolist(), skip_special_tokens=False) for row in rows]
    parts = [short.messages, *parts_by_hand([SYSTEM], TURNS[:5], 115)]
    assert texts == [written(part) for part in [*parts, [SYSTEM, *TURNS[0]], [SYSTEM, *TURNS[1]]]]
    lengths = [length(short.messages), 122, length(long.messages), length(alone.messages), length(odd.messages)]
    assert lengths[0] <= 115 < lengths[1]
    assert lengths[4] == max(lengths)
    assert caplog.messages == [
        "4 of 5 rows (80 %) of a.jsonl have more than 115 tokens (max_length), the longest "
        f"{lengths[4]} (line 5): 2 cut between turns, 2 left out (no conversation, or none of its turns fits); "
        "long_rows is drop_turns, or raise max_length",
        "2 turns alone have more than 115 tokens: left out",
    ]


def test_the_same_row_twice_is_two_rows():
    example = chat(*TURNS)
    once, twice = (encode_examples([example] * n, TOKENIZER, 90, LongRows("drop_turns")) for n in (1, 2))
    assert [row.tokens.tolist() for row in twice] == [row.tokens.tolist() for row in once] * 2


def test_only_parts_with_an_answer_to_learn_are_rows():
    unlearned = [TURNS[5][0], {**TURNS[5][1], "train": False}]
    example = chat(*TURNS[:5], unlearned, [said("user", "And?")], head=())
    rows = encode_examples([example], TOKENIZER, 75, LongRows("drop_turns"))
    texts = [TOKENIZER.decode(row.tokens) for row in rows]
    assert texts == [written(part).replace(END, "") for part in parts_by_hand((), TURNS[:5], 75)]


def test_a_template_that_writes_one_sequence_for_each_answer_is_cut_so_that_all_of_them_fit(tmp_path):
    last = (  # the last answer is written with a sign before it
        "{% for m in messages %}{{ m.role[0] }}:{{ '*' if loop.last and m.role == 'assistant' }}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:*{% endif %}"
    )
    (tmp_path / "last.jinja").write_text(last)
    tokenizer = Bytes(chat_template=str(tmp_path / "last.jinja")).build()
    turns = [[said("user", f"q{n}"), said("assistant", f"r{n}")] for n in range(3)]
    rows = encode_examples([chat(*turns, head=())], tokenizer, 21, LongRows("drop_turns"))
    texts = [tokenizer.decode(row.tokens) for row in rows]
    assert texts == ["u:q0a:*r0", "u:q1a:*r1", "u:q1a:r1u:q2a:*r2"]


def test_a_prompt_loses_as_few_of_its_oldest_turns_as_make_it_fit(caplog):
    question = said("user", "And?")
    for most in range(30, 260, 9):
        example = chat(*TURNS, [question])
        stream = PromptStream([example, Example("x")], TOKENIZER, most, long_rows=LongRows("drop_turns"))
        batch, _ = next(stream.sequential(2))
        fits = [
            text
            for first in range(8)
            if len(text := written([SYSTEM, *chain(*TURNS[first:]), question]) + "Assistant:")
            - text.count(END) * (len(END) - 1) <= most
        ]  # fmt: skip
        kept = [TOKENIZER.decode(prompt) for prompt in batch.unpadded()]
        assert kept[0] == (fits[0].replace(END, "") if fits else "x")  # left out where even the last does not
        assert batch.examples[0].messages == (example.messages if fits else ())
    assert "1 of 2 rows (50 %) of the data has more than 30 tokens" in caplog.text
    assert "1 left out (no conversation, or its last turn does not fit)" in caplog.text


def test_a_turn_begins_with_a_users_message_and_holds_the_calls_of_tools():
    call = said("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    tool = said("tool", "4")
    first = [
        said("assistant", "Welcome."),
        said("user", "a"),
        said("user", "b"),
        call,
        tool,
        said("assistant", "c"),
    ]
    second = [said("user", "d"), said("assistant", "e")]
    developer = said("developer", "x")
    turns = Turns.of([SYSTEM, developer, *first, *second])
    assert turns == Turns((SYSTEM, developer), (tuple(first), tuple(second)))
    assert turns.part(1, 2) == [SYSTEM, developer, *second]
    assert Turns.of([SYSTEM]).turns == ()


def test_each_answered_turn_becomes_a_row_that_reads_so_many_turns(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [SYSTEM, *chain(*TURNS[:3]), said("user", "And?")]
    path.write_text(
        json.dumps({"messages": messages, "id": 7}) + "\n" + json.dumps({"messages": [TURNS[0][0]]})
    )
    one, two, three, alone = Chat(train=path, context_turns=1).load("train")
    assert [list(e.messages) for e in (one, two, three)] == [[SYSTEM, *turn] for turn in TURNS[:3]]
    assert [(e.prompt, e.response) for e in (one, two)] == [
        (t[0]["content"], t[1]["content"]) for t in TURNS[:2]
    ]
    answer = TURNS[1][1]["content"]
    assert two.columns == {"id": 7, "messages": [SYSTEM, TURNS[1][0]], "references": answer}
    assert "references" not in alone.columns
    assert (alone.messages, alone.response) == ((TURNS[0][0],), None)
    assert two.where == f"{path}:1"
    _, both, last, _ = Chat(train=path, context_turns=2).load("train")
    assert list(last.messages) == [SYSTEM, TURNS[1][0], {**TURNS[1][1], "train": False}, *TURNS[2]]
    (row,) = encode_examples([both], TOKENIZER, 999)
    assert TOKENIZER.decode(row.tokens) == written(both.messages).replace(END, "")
    assert TOKENIZER.decode(row.tokens[row.loss_mask]) == f" {TURNS[1][1]['content']}"  # the last answer alone
    every = Chat(train=path, context_turns=9).load("train")
    assert [len(e.messages) for e in every] == [3, 5, 7, 1]


def test_turns_of_a_conversation_stay_on_one_side_of_the_split(tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [said("user", f"topic {n}"), said("assistant", "ok"), *TURNS[0]]} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = {"train": path, "held_out_fraction": 0.3, "context_turns": 2}
    topics = [
        {e.messages[0]["content"] for e in Chat(**settings).load(split)} for split in ("train", "held_out")
    ]
    assert [len(found) for found in topics] == [7, 3]
    assert topics[0].isdisjoint(topics[1])


def test_a_turn_that_answers_nothing_to_learn_is_no_row_of_its_own():
    unlearned = [TURNS[1][0], {**TURNS[1][1], "train": False}]
    rows = one_turn_each([*TURNS[0], *unlearned, *TURNS[2]], 2)
    assert rows == [TURNS[0], [*unlearned, *TURNS[2]]]
    assert one_turn_each([TURNS[0][0]], 3) == [[TURNS[0][0]]]


def test_a_part_that_the_template_refuses_names_its_row(tmp_path):
    refuses = "{% if messages[0].content == 'b' %}{{ raise_exception('no b') }}{% endif %}" + (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    (tmp_path / "no-b.jinja").write_text(refuses)
    tokenizer = Bytes(chat_template=str(tmp_path / "no-b.jinja")).build()
    turns = [[said("user", text), said("assistant", "x" * 9)] for text in "ab"]
    with pytest.raises(UserError, match=r"^chat.jsonl:3: the chat template refuses the messages: no b"):
        encode_examples([chat(*turns, head=(), where="chat.jsonl:3")], tokenizer, 20, LongRows("drop_turns"))
