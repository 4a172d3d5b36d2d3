import gzip
import json
import os
import time

import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.data import files
from hybrid_jax.data.files import json_rows, read_data
from hybrid_jax.data.sources import Jsonl, Text


def test_rows_are_read_line_by_line_and_named_by_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)  # so that rows straddle what is read at once
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\n{"b": "\xc3\xa9\xe2\x80\xa8"}\n{"c": 3}'
    )  # U+2028 ends no line
    expected = [(f"{path}:1", {"a": 1}), (f"{path}:3", {"b": "é\u2028"}), (f"{path}:4", {"c": 3})]
    assert list(json_rows(path)) == expected
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in json_rows(packed)] == [row for _, row in expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', ":2: key 'prompt' is there twice; keep one"),
        (b'{"prompt": "a", "completion": "b", "score": NaN}', ":2: not JSON: NaN is no number"),
        (b'{"prompt": "a", "completion": "\\ud83d"}', ":2: \\ud83d is half a character"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"1" * 5000 + b"}", "… has 5000 digits"),
        (b'{"prompt": ' * 5000 + b"1" + b"}" * 5000, ":2: more than 100 objects and lists in one another"),
        (b'{"prompt": "\xff"}', ":2 must be UTF-8 text, got byte 0xff at 12"),
        (b'{"prompt": "' + b"a" * 100 + b'"}', ":2: a line must have at most 0 MiB, got more; split the row"),
    ],
)
def test_a_row_that_means_nothing_for_certain_is_an_error(tmp_path, monkeypatch, line, message):
    if b"aaa" in line:
        monkeypatch.setattr(files, "MOST_ROW", 90)
        monkeypatch.setattr(files, "_CHUNK", 32)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(UserError) as caught:
        Jsonl(train=path).load("train")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_small_file_that_unpacks_to_a_large_one_is_refused_before_it_fills_the_memory(tmp_path):
    packed = tmp_path / "bomb.jsonl.gz"
    with gzip.open(packed, "wb", compresslevel=1) as file:
        for _ in range(24):
            file.write(b"\n" * 2**20)
    started = time.process_time()
    for read in (read_data, lambda path: list(json_rows(path))):
        with pytest.raises(UserError, match="unpacks to more than 100 times its size, as no text"):
            read(packed)
    assert time.process_time() - started < 5


def test_what_never_ends_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, what in [
        (tmp_path / "pipe.jsonl", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path, "a directory"),
    ]:
        for source in (Jsonl(train=path), Text(train=path)):
            with pytest.raises(UserError, match=f"^data file '{path}' is {what}; expected a regular file$"):
                source.load("train")


ROWS = [{"q": f'{n} "quoted" [}} \\\\', "a": {"b": [1, {"c": "é\\n"}]}} for n in range(9)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_a_list_of_rows_is_read_however_it_is_laid_out(indent, wrapped, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    path = tmp_path / "rows.json"
    value = {"data": ROWS} if wrapped else ROWS
    path.write_text("\ufeff" + json.dumps(value, indent=indent, ensure_ascii=False))
    assert list(json_rows(path)) == [(f"{path}, row {n}", row) for n, row in enumerate(ROWS, start=1)]


def test_a_list_larger_than_a_row_may_be_is_read_row_by_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    monkeypatch.setattr(files, "MOST_ROW", 2 * len(json.dumps(ROWS[0])))
    monkeypatch.setattr(files, "_CHUNK", 16)
    assert [row for _, row in json_rows(path)] == ROWS
    path.write_text(json.dumps([{"q": "a" * 999}]))
    with pytest.raises(UserError, match="row 1: a row must have at most 0 MiB, got more; write one row a line"):
        list(json_rows(path))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"version": "1.1",\n "data": [{"q": 1},\n {"q": 2}]}', [{"q": 1}, {"q": 2}]),
        ('{"data": [{"q": 1}]}', [{"q": 1}]),
        ('{"messages": [{"role": "user", "content": "a"}]}', None),  # these are rows themselves
        ('{"conversations": [\n{"from": "human", "value": "a"}]}', None),
        ('{"prompt": "a", "tools": [{"b": 1}]}', None),
        ('{"prompt": "a",\n "completion": "b"}', None),
        ('{"data": [{"q": 1}], "more": [{"q": 2}]}', None),
        ("[]", []),
    ],
)
def test_one_object_is_a_row_unless_it_holds_nothing_but_a_list_of_them(text, rows, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert [row for _, row in json_rows(path)] == ([json.loads(text)] if rows is None else rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}', ", row 1: not JSON: expected , or ] behind the row, got the end of the file"),
        ('[{"a": 1},]', ", row 2: expected an object of fields, got ']'"),
        ('[{"a": 1} {"a": 2}]', ", row 1: not JSON: expected , or ] behind the row, got '{'"),
        ('[{"a": 1}]\n{"a": 2}', ": not JSON: text behind the list, at line 2"),
        ('[{"a": 1},\n {"a":\n nul}]', ", row 2: not JSON: Expecting value at line 3 column 2"),
        ('[{"a": "b', ", row 1: not JSON: the file ends inside the row, at line 1"),
        ('[{"a": 1, "a": 2}]', ", row 1: key 'a' is there twice; keep one"),
        ('[{"a": NaN}]', ", row 1: not JSON: NaN is no number"),
        ('[{"a": "\\ud83d"}]', ", row 1: \\ud83d is half a character"),
        ('[{"a": ' + "[" * 200, ", row 1: more than 100 objects and lists in one another"),
        ('{"a":\n', ":1: not JSON: Expecting value at line 2 column 1"),
    ],
)
def test_a_list_that_is_no_strict_json_is_one_line(text, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        list(json_rows(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
