import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.packing import Encoded, encode_examples, number_pairs, pack, pad, token_batch
from hybrid_jax.data.tokenizer import Bytes

END = 256


@pytest.fixture(scope="module")
def tokenizer():
    return Bytes().build()


def sequence(*tokens: int, learned_from: int = 1) -> Encoded:
    return Encoded(np.array(tokens, np.int32), np.arange(len(tokens)) >= learned_from)


def test_the_prompt_is_read_the_response_and_its_end_are_learned(tokenizer):
    (encoded,) = encode_examples([Example("ab", "cde")], tokenizer, 8)
    assert encoded.tokens.tolist() == [97, 98, 99, 100, 101, END]
    assert encoded.loss_mask.tolist() == [False, False, True, True, True, True]


def test_a_document_is_learned_from_its_second_token_on(tokenizer):
    (encoded,) = encode_examples([Example("", "abc")], tokenizer, 8)
    assert encoded.tokens.tolist() == [97, 98, 99, END]
    assert encoded.loss_mask.tolist() == [False, True, True, True]


def test_an_empty_response_teaches_to_end(tokenizer):
    (encoded,) = encode_examples([Example("ab", "")], tokenizer, 8)
    assert (encoded.tokens.tolist(), encoded.loss_mask.tolist()) == ([97, 98, END], [False, False, True])


def test_a_cut_response_keeps_its_first_tokens_has_no_end_and_one_line_counts_the_cuts(tokenizer, caplog):
    examples = [Example("ab", "cdefgh"), Example("a", "b"), Example("abc", "de")]
    first, second, third = encode_examples(examples, tokenizer, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 rows (66.7 %) of the data have more than 5 tokens (max_length), the longest 9 (row 1): "
        "2 cut at the end; long_rows is truncate_end, or raise max_length"
    ]
    assert first.tokens.tolist() == [97, 98, 99, 100, 101]
    assert first.loss_mask.tolist() == [False, False, True, True, True]
    assert second.tokens.tolist() == [97, 98, END]
    assert third.tokens.tolist() == [97, 98, 99, 100, 101]


def test_rows_with_an_empty_text_are_counted(tokenizer, caplog):
    texts = [("ab", "c"), ("ab", ""), ("", "c"), ("ab", "")]
    encode_examples([Example(*pair, where=f"a.jsonl:{n}") for n, pair in enumerate(texts)], tokenizer, 8)
    assert caplog.messages == [
        "2 of 4 rows (50 %) of a.jsonl, first line 1, have an empty response, which teaches to end at once",
        "1 of 4 rows (25 %) of a.jsonl, first line 2, have an empty prompt and are learned as documents",
    ]


def test_a_response_that_just_fits_is_not_cut(tokenizer):
    (encoded,) = encode_examples([Example("ab", "cd")], tokenizer, 5)
    assert encoded.tokens.tolist() == [97, 98, 99, 100, END]


def test_a_prompt_that_leaves_no_room_for_its_response_is_left_out_and_counted(tokenizer, caplog):
    examples = [Example("ab", "d"), Example("abcd", "e", where="a.jsonl:7"), Example("abc", "ef")]
    first, third = encode_examples(examples, tokenizer, 4)
    assert [first.tokens.tolist(), third.tokens.tolist()] == [[97, 98, 100, END], [97, 98, 99, 101]]
    assert ": 1 cut at the end, 1 left out (cut, nothing to learn would remain);" in caplog.text


def test_a_row_cut_at_its_start_keeps_the_end_of_its_prompt_and_the_whole_response(tokenizer):
    (row,) = encode_examples([Example("abcd", "ef")], tokenizer, 5, LongRows("truncate_start"))
    assert row.tokens.tolist() == [99, 100, 101, 102, END]
    assert row.loss_mask.tolist() == [False, False, True, True, True]


def test_a_response_without_its_start_or_its_prompt_is_not_taught(tokenizer, caplog):
    examples = [Example("a", "cdef"), Example("ab", "cdef"), Example("a", "b")]
    (row,) = encode_examples(examples, tokenizer, 5, LongRows("truncate_start"))
    assert row.tokens.tolist() == [97, 98, END]
    assert ": 2 left out (cut, nothing to learn would remain);" in caplog.text


def test_of_a_conversation_cut_at_its_start_only_whole_answers_are_taught():
    tokenizer = Bytes(chat_template="plain").build()
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "More"), ("assistant", "Much")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    whole = tokenizer.encode_rendered(
        "User: Hi\nAssistant: Yo<|endoftext|>\nUser: More\nAssistant: Much<|endoftext|>\n"
    ).ids
    example = Example("More", "Much", messages=messages)
    for kept, taught in [(len(whole) - 20, 6), (len(whole) - 5, 10)]:  # within the first answer; within "User"
        (row,) = encode_examples([example], tokenizer, kept, LongRows("truncate_start"))
        assert row.tokens.tolist() == whole[-kept:]
        assert tokenizer.decode(row.tokens[row.loss_mask]) == {6: " Much", 10: " Yo Much"}[taught]


def test_a_document_among_pairs_is_cut_at_either_end_and_learned_from_its_second_token(tokenizer):
    examples = [Example("", "abcdef"), Example("a", "b")]
    start, _ = encode_examples(examples, tokenizer, 4, LongRows("truncate_start"))
    end, _ = encode_examples(examples, tokenizer, 4, LongRows("truncate_end"))
    assert (start.tokens.tolist(), end.tokens.tolist()) == ([100, 101, 102, END], [97, 98, 99, 100])
    assert start.loss_mask.tolist() == end.loss_mask.tolist() == [False, True, True, True]


def test_long_rows_are_dropped_or_refused_with_all_counts_at_once(tokenizer, caplog):
    examples = [Example("ab", "c" * n, where=f"dir/a.jsonl:{n}") for n in range(1, 9)]
    settings = ("phases.sft.length", "phases.sft.long_rows")
    kept = encode_examples(examples, tokenizer, 5, LongRows("drop", *settings))
    assert [len(row.tokens) for row in kept] == [4, 5]
    found = (
        "6 of 8 rows (75 %) of dir/a.jsonl have more than 5 tokens (phases.sft.length), the longest 11 (line 8)"
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"{found}: 6 left out; phases.sft.long_rows is drop, or raise phases.sft.length"
    ]
    with pytest.raises(UserError) as caught:
        encode_examples(examples, tokenizer, 5, LongRows("error", *settings))
    assert str(caught.value) == (
        f"{found}; raise phases.sft.length, or let phases.sft.long_rows be drop or truncate"
    )
    with pytest.raises(UserError, match=r"^8 of 8 rows \(all\) .* so that none is left; raise phases\.sft\.le"):
        encode_examples(examples, tokenizer, 3, LongRows("drop", *settings))


def test_an_example_without_response_is_an_error_that_names_the_row(tokenizer):
    with pytest.raises(UserError, match="row 2: no response to learn from"):
        encode_examples([Example("a", "b"), Example("a")], tokenizer, 8)


def test_packing_puts_each_sequence_into_the_first_row_with_room():
    batch = pack(
        [
            sequence(1, 2, 3, 4, learned_from=2),
            sequence(5, 6, 7),
            sequence(8, 9),
            sequence(10, 11, 12, learned_from=2),
        ],
        6,
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 10, 11, 12]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]]
    assert batch.loss_mask.tolist() == [
        [False, False, True, True, False, True],
        [False, True, True, False, False, True],
    ]
    assert (batch.tokens.dtype, batch.segment_ids.dtype, batch.loss_mask.dtype) == (
        np.int32,
        np.int32,
        np.bool_,
    )


def test_padding_is_at_the_right_with_segment_zero_and_no_loss():
    batch = pad([sequence(1, 2), sequence(3, 4, 5)], 4)
    assert batch.tokens.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.loss_mask.tolist() == [[False, True, False, False], [False, True, True, False]]


def test_packed_and_padded_rows_hold_the_same_sequences():
    random = np.random.default_rng(0)
    sequences = [
        sequence(*random.integers(0, 9, size), learned_from=random.integers(1, size))
        for size in random.integers(2, 17, 300)
    ]
    packed, padded = pack(sequences, 16), pad(sequences, 16)
    assert len(packed.tokens) < 0.75 * len(padded.tokens)

    def contents(batch):
        found = []
        for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                found.append((tokens[here].tolist(), mask[here].tolist()))
        return sorted(found)

    assert contents(packed) == contents(padded)
    for batch in (packed, padded):
        starts = np.diff(batch.segment_ids, axis=1, prepend=0) > 0
        assert not batch.loss_mask[starts].any()
        assert not batch.loss_mask[batch.segment_ids == 0].any()


def test_pairs_have_odd_numbers_for_what_is_read_and_even_ones_from_the_first_target_on():
    batch = number_pairs(pack([sequence(1, 2, 3, learned_from=2), sequence(4, 5), sequence(6, 7, 8)], 6))
    assert batch.segment_ids.tolist() == [[1, 1, 2, 3, 4, 0], [1, 2, 2, 0, 0, 0]]
    learned = np.array([[False, False, True, False, True, False, False]])  # a question between two answers
    several = token_batch(np.arange(7)[None], np.array([[1, 1, 1, 1, 1, 2, 0]]), learned)
    assert number_pairs(several).segment_ids.tolist() == [[1, 1, 2, 2, 2, 3, 0]]


def test_first_fit_looks_back_over_a_bounded_number_of_rows(monkeypatch):
    monkeypatch.setattr("hybrid_jax.data.packing.OPEN_ROWS", 2)
    long, short = sequence(1, 2, 3), sequence(7)
    batch = pack([long, long, long, short], 4)  # the first row has room but is no longer looked at
    assert batch.tokens.tolist() == [[1, 2, 3, 0], [1, 2, 3, 7], [1, 2, 3, 0]]


@pytest.mark.parametrize("arrange", [pack, pad])
def test_a_sequence_longer_than_the_row_is_refused(arrange):
    with pytest.raises(ValueError, match="a sequence must fit length 2, got 3 tokens"):
        arrange([sequence(1, 2, 3)], 2)
