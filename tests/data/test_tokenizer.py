import json
import re
import subprocess
import sys

import pytest

from hybrid_jax.core.config import parse
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.chat import encode_question
from hybrid_jax.data.corpora import restaurants
from hybrid_jax.data.tokenizer import EOS_TOKEN, TOKENIZERS, Bpe, Bytes, HuggingFace, load_tokenizer
from hybrid_jax.data.tokenizer_files import missing_package

TEXTS = [
    "",
    " ",
    "The Eagle serves cheap tapas.",
    "  two  spaces\n\ttab\r\n",
    "naïve café, Straße, 日本語, Ελληνικά, русский, עברית",
    "🍕👩‍👩‍👧 e\u0301 \x00\x7f\u200b\ufeff",
    f"a written {EOS_TOKEN} is only text",
]


@pytest.fixture(scope="module")
def corpus():
    return [text for e in restaurants("train", size=500) for text in (e.prompt, e.response)]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, corpus):
    return TOKENIZERS[request.param]().build(corpus)


@pytest.mark.parametrize("text", TEXTS)
def test_any_unicode_text_comes_back_unchanged(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids


def test_bytes_are_their_own_ids_and_the_end_is_256():
    tokenizer = Bytes().build()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.encode("Aé\n") == [65, 0xC3, 0xA9, 10]
    every_byte = bytes(range(256)).decode("latin-1")
    assert tokenizer.encode(every_byte) == list(every_byte.encode())


def test_decoding_skips_the_end_and_ids_the_model_has_but_the_tokenizer_has_not(tokenizer):
    ids = tokenizer.encode("good")
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_size + 99]) == "good"


def test_half_a_character_decodes_to_the_replacement_sign():
    assert Bytes().build().decode([65, 0xC3]) == "A\ufffd"


def test_a_lone_surrogate_from_json_does_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode(json.loads('"a\\ud800b"'))) == "a?b"


def test_bpe_has_the_size_asked_for_all_bytes_and_shorter_texts_than_bytes(corpus):
    tokenizer = Bpe(vocab_size=400).build(corpus)
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode("The Eagle is cheap.")) < 12 < len("The Eagle is cheap.")


def test_bpe_merges_the_most_frequent_pair_first():
    # "ab" occurs 3 times within words, "bc" twice and "abc" then once more: 257 ids, then the merges ab, abc.
    tokenizer = Bpe(vocab_size=259).build(["abc ab", "abc"])
    assert tokenizer.decode([257]) == "ab"
    assert tokenizer.decode([258]) == "abc"
    assert tokenizer.encode("abcab") == [258, 257]


def test_bpe_training_is_deterministic_across_processes(corpus):
    program = (
        "from hybrid_jax.data.corpora import restaurants; from hybrid_jax.data.tokenizer import Bpe\n"
        "texts = [t for e in restaurants('train', size=500) for t in (e.prompt, e.response)]\n"
        "print(Bpe(420).build(texts).encode(' '.join(texts[:60])))"
    )
    here = Bpe(420).build(corpus).encode(" ".join(corpus[:60]))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here


def test_a_saved_tokenizer_loads_with_equal_ids_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "new" / "folder")
    ours = load_tokenizer(tmp_path / "new" / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert (ours.vocab_size, ours.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
        if EOS_TOKEN not in text:  # transformers reads a written special token as the token itself
            assert theirs.encode(text, add_special_tokens=False) == ids
            assert theirs.decode(ids) == text


def test_bytes_and_bpe_never_import_transformers(tmp_path):
    program = (
        "import sys; from hybrid_jax.data.tokenizer import Bpe, Bytes, load_tokenizer\n"
        "for kind in (Bpe(260), Bytes()):\n"
        "    kind.build(['some text']).save(sys.argv[1]); load_tokenizer(sys.argv[1])\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


@pytest.fixture
def foreign_folder(tmp_path, corpus):
    """A Hugging Face tokenizer made elsewhere, whose pad token is its end token."""
    Bpe(300).build(corpus).save(tmp_path / "foreign")
    config = tmp_path / "foreign" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["hybrid_jax_kind"]
    config.write_text(json.dumps({**settings, "pad_token": EOS_TOKEN}))
    return tmp_path / "foreign"


def test_a_hugging_face_folder_works_saves_and_loads_again(foreign_folder, tmp_path):
    tokenizer = HuggingFace(str(foreign_folder)).build()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
    ids = tokenizer.encode("naïve café 🍕")
    assert tokenizer.decode([*ids, tokenizer.eos_id, 5000]) == "naïve café 🍕"
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").encode("naïve café 🍕") == ids


def test_a_folder_without_a_tokenizer_or_without_an_end_is_one_clear_line(foreign_folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        HuggingFace(str(tmp_path / "nothing")).build()
    config = foreign_folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["eos_token"]
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="has no end token; set eos_token"):
        HuggingFace(str(foreign_folder)).build()


def test_a_folder_that_was_damaged_is_one_clear_line(tmp_path):
    Bytes().build().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(tmp_path)


DEEP = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer_config.json", DEEP, "tokenizer_config.json: more than 100 objects and lists"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected an object, got list"),
        ("special_tokens_map.json", DEEP, "special_tokens_map.json: more than 100 objects and lists"),
        ("added_tokens.json", '{"a": 1, "a": 2}', "added_tokens.json: key 'a' is there twice; keep one"),
        ("tokenizer.json", f'{{"model": {DEEP}}}', "cannot be read: "),
        ("tokenizer.json", "{}", "cannot be read: Model missing. at line 1 column 2"),
    ],
)
def test_a_file_that_is_no_tokenizers_is_one_clear_line(tmp_path, file, content, said):
    Bytes().build().save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model", "merges.txt", "vocab.json"])
def test_a_vocabulary_must_be_a_regular_file_of_a_bounded_size(tmp_path, file):
    Bytes().build().save(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    with (tmp_path / file).open("wb") as huge:
        huge.truncate(2**31)  # without taking room on the disk
    with pytest.raises(UserError, match=f"{file}' must have at most 128 MiB, got 2048"):
        load_tokenizer(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{file}' is a device; expected a regular file"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_ours_without_its_end_is_one_clear_line(tmp_path):
    Bytes().build().save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has no token '<\|endoftext\|>', with which texts end"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size must be in \[257, 1048576\], got 256"):
        parse(Bpe, {"vocab_size": 256})


def test_a_slow_tokenizer_encodes_and_says_that_chat_needs_a_fast_one(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    tokenizer = HuggingFace(str(tmp_path), chat_template="plain").build()
    ids = tokenizer.encode("naïve ☄")
    assert ids == [byte + 3 for byte in "naïve ☄".encode()]
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "naïve ☄"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (259, 1)
    with pytest.raises(UserError, match=r"chat needs a fast tokenizer, .* ByT5Tokenizer is a slow one"):
        encode_question([{"role": "user", "content": "Hi"}], tokenizer)


def test_ids_with_gaps_are_all_in_the_vocabulary(foreign_folder):
    path = foreign_folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocab = settings["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    vocab[last] += 100
    path.write_text(json.dumps(settings))
    tokenizer = HuggingFace(str(foreign_folder)).build()
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode([399]) != ""


def test_a_tokenizer_model_alone_names_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setattr("hybrid_jax.data.tokenizer_files._is_installed", lambda package: False)
    assert missing_package(tmp_path) == "tiktoken"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    with pytest.raises(UserError, match=r"'tokenizer.model' alone, .*: pip install sentencepiece, or add"):
        HuggingFace(str(tmp_path)).build()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert missing_package(tmp_path) is None
