"""A tokenizer that several threads use at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hybrid_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from hybrid_jax.data.tokenizer import Bytes

TEXT = "<|im_start|>user\nHi<|im_end|>\n" * 40


@pytest.fixture(params=["own", "huggingface"])
def tokenizer(request, tmp_path):
    own = Bytes("chatml").build()
    if request.param == "own":
        return own
    own.save(tmp_path)
    from transformers import AutoTokenizer

    return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(tmp_path))


def test_a_thread_that_reads_special_tokens_as_letters_changes_nothing_for_another(tokenizer):
    def read(number):
        plain = bool(number % 2)
        return plain, tokenizer.encode_rendered(TEXT, plain=plain).ids, tokenizer.decode([72, 105])

    expected = {plain: tokenizer.encode_rendered(TEXT, plain=plain).ids for plain in (False, True)}
    assert len(expected[True]) > len(expected[False])
    with ThreadPoolExecutor(4) as pool:
        for plain, ids, text in pool.map(read, range(400)):
            assert ids == expected[plain]
            assert text == "Hi"
