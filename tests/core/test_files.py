import os
import socket

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.core.files import open_regular, read_bytes, read_text
from hybrid_jax.core.json_text import parse_json, read_json


@pytest.fixture
def short_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has 108 letters at most
    return tmp_path


def test_only_a_regular_file_is_opened_and_nothing_else_is_waited_for(short_path):
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    os.mkdir("folder")
    for name, what in [
        ("pipe", "a pipe"),
        ("socket", "a socket"),
        ("folder", "a directory"),
        ("/dev/zero", "a device"),
    ]:
        with pytest.raises(UserError) as caught:
            open_regular(name, "data file")
        assert str(caught.value) == f"data file {name!r} is {what}; expected a regular file"
    with pytest.raises(UserError, match=r"^no data file 'gone'$"):
        open_regular("gone", "data file")
    with pytest.raises(UserError, match=r"cannot be read: embedded null byte"):
        open_regular("a\0b")


def test_a_file_is_read_up_to_its_limit_and_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbfabc")
    assert read_bytes(file, 6) == b"\xef\xbb\xbfabc"
    assert read_text(file, 6) == "abc"
    with pytest.raises(UserError, match=r"file' must have at most 5 bytes, got more: is it the right file\?$"):
        read_bytes(file, 5)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)  # a tebibyte of zeros, none of them on the disk
    with pytest.raises(UserError, match=r"config '.*' must have at most 1 MiB, got more"):
        read_text(file, 2**20, "config")
    file.write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"file must be UTF-8 text, got byte 0xff at 1"):
        read_text(file, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "key 'a' is there twice; keep one"),
        ('{"a": NaN}', "not JSON: NaN is no number; write null, or leave the row out"),
        ('{"a": -Infinity}', "not JSON: -Infinity is no number; write null, or leave the row out"),
        ('{"a": 1e999}', "number '1e999' is too large for 64 bits"),
        ('{"a": ' + "9" * 5000 + "}", "number 99999999999999999999… has 5000 digits"),
        ('{"a": "x\\ud83d"}', "\\ud83d is half a character (a lone surrogate), so the text cannot be written"),
        ('{"\\udc00": 1}', "\\udc00 is half a character"),
        ("[" * 20_000, "more than 100 objects and lists in one another"),
        ('{"a":' * 101 + "1" + "}" * 101, "more than 100 objects and lists in one another"),
        ("[" * 101 + "]" * 101, "more than 100 objects and lists in one another"),
        ('{"a": }', "not JSON: Expecting value at column 7"),
        ('{\n"a": }', "not JSON: Expecting value at line 2 column 6"),
    ],
)
def test_what_is_no_json_or_may_mean_two_things_is_one_line(text, message):
    with pytest.raises(UserError) as caught:
        parse_json(text, "rows.jsonl:7")
    assert str(caught.value).startswith(f"rows.jsonl:7: {message}")


def test_all_else_of_json_is_read_as_it_is():
    assert parse_json('{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"]}', "") == {
        "a": [1, -2500.0, True, None, "😀"]
    }
    assert parse_json("[" * 100 + "]" * 100, "")
    assert len(parse_json("[" + ",".join(["[]"] * 200) + "]", "")) == 200


def test_a_json_file_holds_one_object(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json: expected an object, got list"):
        read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
