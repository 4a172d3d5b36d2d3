import itertools
import json

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.loader import PromptStream, SFTStream, length_buckets
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.packing import encode_examples
from hybrid_jax.data.tokenizer import EOS_TOKEN, Bpe, Bytes, HuggingFace

END = 256


@pytest.fixture(scope="module")
def tokenizer():
    return Bytes().build()


@pytest.fixture(scope="module")
def examples():
    return [Example(f"p{i}", "r" * (1 + i % 7)) for i in range(23)]


@pytest.fixture(scope="module")
def documents():
    return [Example("", "".join(chr(1 + i) for i in range(101)))]


def make(kind, examples, documents, tokenizer, **settings):
    if kind == "packed":
        return SFTStream(examples, tokenizer, 16, **settings)
    if kind == "bucketed":
        return SFTStream(examples, tokenizer, 16, packing=False, **settings)
    return SFTStream(documents, tokenizer, 8, **settings)


def rows_of(batch):
    return [
        tuple(zip(tokens.tolist(), segments.tolist(), mask.tolist(), strict=True))[: int((segments > 0).sum())]
        for tokens, segments, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True)
    ]


@pytest.fixture(params=["packed", "bucketed", "windows"])
def kind(request):
    return request.param


def test_a_new_stream_at_the_same_cursor_goes_on_exactly(kind, examples, documents, tokenizer):
    first = make(kind, examples, documents, tokenizer, seed=3)
    whole = [first.batch(cursor, 4) for cursor in range(0, 80, 4)]
    for start in (0, 20, 44):
        resumed = make(kind, examples, documents, tokenizer, seed=3)
        for step in range(start // 4, 20):
            again = resumed.batch(step * 4, 4)
            assert np.array_equal(again.tokens, whole[step].tokens)
            assert np.array_equal(again.segment_ids, whole[step].segment_ids)
            assert np.array_equal(again.loss_mask, whole[step].loss_mask)


def test_the_batch_size_may_change_on_the_way(kind, examples, documents, tokenizer):
    stream = make(kind, examples, documents, tokenizer)
    by_ones = [row for cursor in range(60) for row in rows_of(stream.batch(cursor, 1))]
    by_sizes, cursor = [], 0
    for size in itertools.cycle((3, 5, 1, 7)):
        if cursor + size > 60:
            break
        by_sizes += rows_of(stream.batch(cursor, size))
        cursor += size
    assert by_sizes == by_ones[:cursor]


@pytest.mark.parametrize("kind", ["packed", "bucketed"])
def test_every_epoch_visits_every_row_once_in_an_order_of_its_own(kind, examples, documents, tokenizer):
    stream = make(kind, examples, documents, tokenizer, seed=1)
    rows = stream.num_rows
    visited = [row for cursor in range(0, 5 * rows, 5) for row in rows_of(stream.batch(cursor, 5))]  # straddles
    epochs = [visited[e * rows : (e + 1) * rows] for e in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == rows for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert rows_of(make(kind, examples, documents, tokenizer, seed=2).batch(0, rows)) != epochs[0]


def test_packed_rows_hold_what_unpacked_rows_hold(examples, tokenizer):
    def sequences(stream):
        found = []
        for row in rows_of(stream.batch(0, stream.num_rows)):
            for _, group in itertools.groupby(row, key=lambda item: item[1]):
                found.append(tuple((token, mask) for token, _, mask in group))
        return sorted(found)

    packed = SFTStream(examples, tokenizer, 16)
    unpacked = SFTStream(examples, tokenizer, 16, packing=False)
    assert packed.num_rows < unpacked.num_rows == 23
    assert sequences(packed) == sequences(unpacked)


def test_without_packing_a_batch_is_padded_to_the_smallest_bucket_that_holds_it(tokenizer):
    lengths = (4, 9, 13)
    examples = [Example("a", "b" * (length - 2)) for length in lengths]
    stream = SFTStream(examples, tokenizer, 16, packing=False, buckets=(8, 4, 14))
    for cursor in range(12):
        batch = stream.batch(cursor, 1)
        length = int((batch.segment_ids > 0).sum())
        assert batch.tokens.shape == (1, {4: 4, 9: 14, 13: 14}[length])
    with pytest.raises(UserError, match="largest bucket must hold 13 tokens"):
        SFTStream(examples, tokenizer, 16, packing=False, buckets=(8,))


def test_the_buckets_of_the_data_are_few_and_hold_the_longest():
    assert length_buckets(20, 128) == (24,)
    assert length_buckets(33, 128) == (40,)
    assert length_buckets(200) == (32, 56, 104, 200)
    assert length_buckets(64) == (32, 64)
    assert length_buckets(61, 62) == (32, 62)
    assert length_buckets(3, 128, smallest=1) == (8,)


def test_windows_of_an_epoch_are_neighbours_and_the_cuts_move_between_epochs(documents, tokenizer):
    whole = [*documents[0].response.encode(), END]  # 102 tokens
    stream = SFTStream(documents, tokenizer, 8, seed=4)
    assert stream.num_rows == 11  # (102 - 8 + 1) // 8: as many as fit behind any offset below 8
    offsets = []
    for epoch in range(12):
        batch = stream.batch(epoch * 11, 11)
        starts = sorted(next(s for s in range(95) if whole[s : s + 8] == row.tolist()) for row in batch.tokens)
        assert np.diff(starts).tolist() == [8] * 10
        assert 0 <= starts[0] < 8
        offsets.append(starts[0])
        assert (batch.segment_ids == 1).all()
        assert batch.loss_mask.tolist() == [[False] + [True] * 7] * 11
    assert len(set(offsets)) > 3


def test_a_window_over_two_documents_keeps_them_apart(tokenizer):
    stream = SFTStream([Example("", "abc"), Example("", "defghijk")], tokenizer, 8)
    (batch,) = stream.sequential(2)
    assert batch.tokens[0].tolist() == [97, 98, 99, END, 100, 101, 102, 103]
    assert batch.segment_ids[0].tolist() == [1] * 4 + [2] * 4
    assert batch.loss_mask[0].tolist() == [False, True, True, True, False, True, True, True]
    assert batch.tokens[1].tolist() == [103, 104, 105, 106, 107, END, 0, 0]
    assert batch.segment_ids[1].tolist() == [1] * 6 + [0] * 2
    assert batch.loss_mask[1].tolist() == [False] + [True] * 5 + [False] * 2


def test_a_text_barely_longer_than_the_window_still_makes_a_row(tokenizer):
    stream = SFTStream([Example("", "abcdefgh")], tokenizer, 8)  # nine tokens with the end
    rows = {tuple(stream.batch(epoch, 1).tokens[0].tolist()) for epoch in range(20)}
    assert rows == {tuple(range(97, 105)), (*range(98, 105), END)}


def test_evaluation_reads_everything_once_and_fills_the_last_batch_with_masked_rows(examples, tokenizer):
    for packing in (True, False):
        stream = SFTStream(examples, tokenizer, 16, packing=packing)
        batches = list(stream.sequential(5))
        assert len({batch.tokens.shape for batch in batches}) == 1
        assert batches[0].tokens.shape[0] == 5
        rows = [row for batch in batches for row in rows_of(batch)]
        empty = rows.count(())
        assert empty == -stream.num_rows % 5 > 0
        assert all(row == () for row in rows[len(rows) - empty :])
        epoch = rows_of(stream.batch(0, stream.num_rows))
        assert sorted(row for row in rows if row) == sorted(epoch)


def test_evaluation_of_long_documents_scores_every_token_but_the_first_once(documents, tokenizer):
    whole = [*documents[0].response.encode(), END]
    batches = list(SFTStream(documents, tokenizer, 8).sequential(4))
    assert all(batch.tokens.shape == (4, 8) for batch in batches)
    scored = [int(t) for batch in batches for t in batch.tokens[batch.loss_mask]]
    assert scored == whole[1:]


def test_prompts_are_left_padded_and_masked_by_length(tokenizer):
    stream = PromptStream([Example("abc", "r", {"x": 1}), Example("d")], tokenizer, 8, buckets=(4,))
    batch = stream.batch(0, 2)
    order = [len(example.prompt) for example in batch.examples]
    expected = {
        3: ([0, 97, 98, 99], [False, True, True, True]),
        1: ([0, 0, 0, 100], [False, False, False, True]),
    }
    assert batch.tokens.tolist() == [expected[n][0] for n in order]
    assert batch.mask.tolist() == [expected[n][1] for n in order]
    assert {example.columns.get("x") for example in batch.examples} == {1, None}
    assert (batch.tokens.dtype, batch.mask.dtype) == (np.int32, np.bool_)


def test_the_prompt_stream_resumes_covers_epochs_and_keeps_examples_beside_their_tokens(examples, tokenizer):
    stream = PromptStream(examples, tokenizer, 8, seed=5)
    seen = []
    for cursor in range(0, 46, 4):
        batch = stream.batch(cursor, 4)
        again = PromptStream(examples, tokenizer, 8, seed=5).batch(cursor, 4)
        assert np.array_equal(batch.tokens, again.tokens)
        assert batch.examples == again.examples
        for tokens, mask, example in zip(batch.tokens, batch.mask, batch.examples, strict=True):
            assert tokenizer.decode(tokens[mask]) == example.prompt
        seen += [example.prompt for example in batch.examples]
    assert sorted(seen[:23]) == sorted(seen[23:46]) == sorted(example.prompt for example in examples)
    assert seen[:23] != seen[23:46]


def test_prompts_for_evaluation_come_in_order_and_say_how_many_count(examples, tokenizer):
    batches = list(PromptStream(examples, tokenizer, 8).sequential(5))
    assert [count for _, count in batches] == [5, 5, 5, 5, 3]
    assert {batch.tokens.shape for batch, _ in batches} == {(5, 8)}
    prompts = [example.prompt for batch, count in batches for example in batch.examples[:count]]
    assert prompts == [example.prompt for example in examples]
    last, _ = batches[-1]
    assert last.mask.any(axis=1).all()
    assert len(last.examples) == 5


def test_masks_ignore_token_values_so_a_pad_that_is_the_end_changes_nothing(tmp_path):
    Bpe(260).build(["ab"]).save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(config.read_text()).items() if not k.startswith("hybrid")}
    config.write_text(json.dumps({**settings, "pad_token": EOS_TOKEN}))
    tokenizer = HuggingFace(str(tmp_path)).build()
    end = tokenizer.eos_id
    assert end == 0  # the value that padding has, too
    example = Example(f"x{EOS_TOKEN}y", "z")  # an end token inside the prompt is a token like any other

    prompts = PromptStream([example, Example("1")], tokenizer, 4, buckets=(4,))
    (batch, _) = next(prompts.sequential(2))
    assert batch.tokens[0].tolist()[2] == end
    assert batch.mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    (rows,) = SFTStream([example], tokenizer, 6, packing=False, buckets=(6,)).sequential(1)
    assert rows.tokens[0].tolist()[4:] == [end, 0]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert rows.loss_mask.tolist() == [[False, False, False, True, True, False]]


def test_a_prompt_too_long_or_empty_is_an_error_with_row_got_and_fix(tokenizer):
    with pytest.raises(
        UserError,
        match=r"more than 3 tokens \(max_prompt_length\), the longest 4 \(row 2\); raise max_prompt_le",
    ):
        PromptStream([Example("abc"), Example("abcd")], tokenizer, 3)
    with pytest.raises(
        UserError, match=r"^row 1: a prompt must have at least 1 token, got none; give the row a prompt"
    ):
        PromptStream([Example("", "a document")], tokenizer, 3)


def test_a_long_prompt_is_left_out_with_its_example_or_keeps_its_end(tokenizer, caplog):
    examples = [Example("abcd", where="a:1"), Example("xy", where="a:2"), Example("abc", where="a:3")]
    batch, _ = next(PromptStream(examples, tokenizer, 3, long_rows=LongRows("drop")).sequential(2))
    assert [example.prompt for example in batch.examples] == ["xy", "abc"]
    assert (
        "1 of 3 rows (33.3 %) of a has more than 3 tokens (max_length), the longest 4 (line 1): 1 left out"
        in (caplog.text)
    )
    stream = PromptStream(examples, tokenizer, 3, long_rows=LongRows("truncate_start"))
    assert bytes(next(stream.sequential(3))[0].tokens[0, -3:].tolist()) == b"bcd"


def test_without_a_bound_any_prompt_fits(tokenizer):
    assert PromptStream([Example("abc" * 99)], tokenizer, None).batch(0, 1).tokens.shape == (1, 304)


def test_a_row_must_hold_a_token_and_its_target(tokenizer):
    with pytest.raises(UserError, match="max_length must be at least 2 tokens, got 1"):
        SFTStream([Example("", "a")], tokenizer, 1)


@pytest.mark.parametrize("stream", [SFTStream, PromptStream])
def test_no_examples_or_a_negative_seed_are_refused(stream, tokenizer):
    with pytest.raises(UserError, match="the data is empty"):
        stream([], tokenizer, 8)
    with pytest.raises(ValueError, match=r"seed must be in .*, got -1"):
        stream([Example("a", "b")], tokenizer, 8, seed=-1)


def test_documents_that_fit_are_packed_whole(tokenizer):
    short = [Example("", "abc"), Example("", "de")]
    (batch,) = SFTStream(short, tokenizer, 8).sequential(1)
    expected = [token for encoded in encode_examples(short, tokenizer, 8) for token in encoded.tokens.tolist()]
    assert batch.tokens[0].tolist() == [*expected, 0]
    assert batch.segment_ids[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 0]
