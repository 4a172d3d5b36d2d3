"""Pairs of answers as rows of tokens: what is learned, what is cut, what is left out, by literal tokens."""

import logging
from typing import Any

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.pair_stream import AnswerStream, PairStream
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.tokenizer import TOKENIZERS

BYTES = TOKENIZERS["bytes"]().build()


def pairs(*rows, length=16, policy: Any = "drop"):
    return PairStream(rows, BYTES, length, long_rows=LongRows(policy, "length", "long_rows", rows="pairs"))


def learned(stream, index=0):
    """The text of both rows, and of what is learned of them; '|' is the end token."""
    batch = stream.rows(np.array([index]))
    both = zip(batch.tokens[0], batch.segment_ids[0], batch.loss_mask[0], strict=True)
    return [(_text(tokens[real > 0]), _text(tokens[mask])) for tokens, real, mask in both]


def _text(tokens):
    return "".join("|" if token == BYTES.eos_id else BYTES.decode([int(token)]) for token in tokens)


def test_only_the_answers_and_their_ends_are_learned():
    assert learned(pairs(Preference("2+2=", "4", "five"))) == [("2+2=4|", "4|"), ("2+2=five|", "five|")]


def test_an_empty_answer_is_its_end_token():
    assert learned(pairs(Preference("hm", "", "no"))) == [("hm|", "|"), ("hmno|", "no|")]


# An answer is written without its thinking once something follows it.
DROPS_THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content if loop.last else "
    "m.content.split('</think>')[-1] }}{{ eos_token }}{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_of_a_conversation_the_last_answer_alone_is_learned_and_earlier_ones_are_read_as_the_policy_reads_them(
    tmp_path,
):
    (tmp_path / "template.jinja").write_text(DROPS_THINKING)
    tokenizer = TOKENIZERS["bytes"](chat_template=str(tmp_path / "template.jinja")).build()
    asked = ("user", "2?"), ("assistant", "<think>hm</think>3"), ("user", "so?")
    messages = tuple({"role": role, "content": content} for role, content in asked)
    row = Preference("so?", "4", "<think>no</think>5", messages)
    stream = PairStream([row], tokenizer, 64)
    assert learned(stream) == [
        ("U:2?A:3|U:so?A:4|", "4|"),
        ("U:2?A:3|U:so?A:<think>no</think>5|", "<think>no</think>5|"),
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("truncate_end", [("2+2=4|", "4|"), ("2+2=five", "five")]),
        ("truncate_start", [("+2=4|", "4|"), ("+2=five|", "five|")]),
    ],
)
def test_both_sides_of_a_long_pair_are_cut_alike(policy, expected):
    # Nine tokens, of which eight fit: only the worse answer is too long, but both lose the start of the prompt.
    assert learned(pairs(Preference("2+2=", "4", "five"), length=8, policy=policy)) == expected


@pytest.mark.parametrize("policy", ["truncate_end", "truncate_start", "drop"])
def test_a_pair_of_which_nothing_would_be_told_apart_is_left_out_with_a_line(policy, caplog):
    rows = Preference("a long prompt: ", "yes", "no"), Preference("a", "b", "c")
    with caplog.at_level(logging.WARNING):
        stream = pairs(*rows, length=4, policy=policy)
    assert stream.num_rows == 1
    assert "1 of 2 pairs" in caplog.text
    assert learned(stream) == [("ab|", "b|"), ("ac|", "c|")]


def test_the_same_answer_twice_and_ties_are_left_out_with_a_line_each(caplog):
    rows = Preference("a", "b", "b"), Preference("a", "b", "c", tie=True), Preference("a", "c", "b")
    with caplog.at_level(logging.WARNING):
        assert pairs(*rows).num_rows == 1
    assert "1 of 3 pairs are ties: left out" in caplog.text
    assert "have the same better and worse answer: left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (Preference("a", "b", "c", tie=True), "the data is empty: all 1 rows are ties"),
        (Preference("a", "b", "b"), "the data is empty: all 1 pairs are of the same answer twice"),
        (Preference("a" * 20, "b", "c"), "so that none is left; raise length"),
    ],
)
def test_data_without_a_pair_to_learn_from_is_one_line(row, line):
    with pytest.raises(UserError, match=line):
        pairs(row)


def answers(*rows, length=16):
    examples = [Example(prompt, response) for prompt, response, _ in rows]
    return AnswerStream(examples, [good for *_, good in rows], BYTES, length)


def test_a_single_answer_stands_beside_the_next_one_to_another_prompt():
    stream = answers(("a", "1", True), ("a", "2", False), ("b", "3", False))
    assert stream.good.tolist() == [True, False, False]
    assert learned(stream, 0) == [("a1|", "1|"), ("a3|", "3|")]
    assert learned(stream, 1) == [("a2|", "2|"), ("a3|", "3|")]
    assert learned(stream, 2) == [("b3|", "3|"), ("b1|", "1|")]


def test_answers_to_one_prompt_stand_beside_different_answers_to_the_next():
    # Files of single answers have the good one first: not all may stand beside good ones.
    stream = answers(*((prompt, kind + prompt, kind == "+") for prompt in "abc" for kind in "+-"))
    assert [learned(stream, i)[1][1] for i in range(6)] == ["+b|", "-b|", "+c|", "-c|", "+a|", "-a|"]
    alone = answers(("a", "1", True), ("a", "2", False), ("a", "3", False))
    assert [learned(alone, i)[1][0] for i in range(3)] == ["a2|", "a3|", "a1|"]


def test_a_long_answer_leaves_out_its_own_row_and_not_the_one_that_it_stands_beside():
    stream = answers(("a", "1", True), ("b", "x" * 30, False), ("c", "3", False))
    assert [learned(stream, i)[0][0] for i in range(2)] == ["a1|", "c3|"]
    assert learned(stream, 0)[1][0] == "a" + "x" * 15


def test_a_row_without_an_answer_is_one_line():
    with pytest.raises(UserError, match="no answer to learn from, got a prompt alone"):
        AnswerStream([Example("a", "1"), Example("b")], [True, False], BYTES, 16)


def test_the_label_of_an_answer_stays_with_it_where_others_are_left_out():
    stream = answers(("a", "1", True), ("b", "x" * 30, True), ("c", "3", False), ("d", "4", True))
    assert [(learned(stream, i)[0][0], good) for i, good in enumerate(stream.good)] == [
        ("a1|", True),
        ("c3|", False),
        ("d4|", True),
    ]


@pytest.mark.parametrize("good", [True, False])
def test_answers_of_one_class_are_one_line(good):
    word = "good" if good else "bad"
    with pytest.raises(UserError, match=f"both classes, good and bad, got 2 that are {word}"):
        answers(("a", "1", good), ("b", "2", good))
