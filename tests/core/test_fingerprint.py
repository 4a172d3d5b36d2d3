"""What changes a digest and what does not; that another process finds the same one."""

import functools
import os
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.fingerprint import WHOLE, digest, file_digest, rows_digest


def test_a_large_table_that_a_reward_holds_is_read_where_it_lies():
    table = np.zeros(2**24, np.uint8)
    before = digest({"table": table})
    tracemalloc.start()
    table[-1] = 1
    assert digest({"table": table}) != before
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert digest(table.reshape(2, -1)) != digest(table) != digest(table.view(np.int8))
    assert digest(bytes(100)) != digest(bytes(99)) != digest(bytearray(b"1" * 99))
    assert digest(np.array(1.0)) != digest(np.array(2.0))


REWARD = """
import math, os, re
from dataclasses import dataclass
import helpers

WORDS = ["good", "fine"]
SCALE = 2.0
NUMBER = re.compile("[0-9]+")
unused = [1, 2, 3]

def count(text):
    return sum(word in WORDS for word in text.split())

def mine(prompts, responses, least=1):
    \"\"\"Counts good words.\"\"\"
    home = os.environ.get("HOME")
    return [max(SCALE * count(r) + math.pi + helpers.extra(r), least) for r in responses]  # a comment

def make(factor):
    return lambda prompts, responses: [factor * len(r) for r in responses]

other = lambda prompts, responses: [1.0 for r in responses]; steps = 10

@dataclass(frozen=True)
class Counted:
    factor: float = 1.0

    @property
    def scale(self):
        return self.factor * SCALE

    def __call__(self, prompts, responses):
        return [self.scale * len(NUMBER.findall(r)) for r in responses]
"""
HELPERS = "def extra(text):\n    return 0.5\n"


def digests(folder, reward=REWARD, helpers=HELPERS, **environment):
    """Digests of a reward module in a process of its own, by name."""
    folder.mkdir(exist_ok=True)
    (folder / "rewards_here.py").write_text(reward)
    (folder / "helpers.py").write_text(helpers)
    code = """
        import rewards_here as r
        from hybrid_jax.core.fingerprint import digest
        print(digest(r.mine), digest(r.make(3)), digest(r.other), digest(r.Counted(2.0)))
    """
    path = os.pathsep.join([str(folder), *sys.path])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return dict(zip(("mine", "make", "other", "Counted"), done.stdout.split(), strict=True))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return digests(tmp_path_factory.mktemp("before"))


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("return sum(word in", "return 2 * sum(word in", {"mine"}),
        ('WORDS = ["good", "fine"]', 'WORDS = ["good"]', {"mine"}),
        ("SCALE = 2.0", "SCALE = 2.5", {"mine", "Counted"}),
        ("least=1", "least=2", {"mine"}),
        ("[factor * len(r)", "[factor - len(r)", {"make"}),
        ("[1.0 for r", "[1.5 for r", {"other"}),
        ('compile("[0-9]+")', 'compile("[0-8]+")', {"Counted"}),
        ("return self.factor * SCALE", "return self.factor + SCALE", {"Counted"}),
        ("# a comment", "# another comment", set()),
        ("steps = 10", "steps = 20", set()),
        ("unused = [1, 2, 3]", "unused = [1, 2]", set()),
    ],
)
def test_a_digest_of_code_changes_with_what_the_code_does_and_with_nothing_else(
    before, tmp_path, old, new, changed
):
    assert old in REWARD
    after = digests(tmp_path, REWARD.replace(old, new))
    assert {name for name in before if before[name] != after[name]} == changed


def test_another_process_finds_the_same_digests_and_sees_helpers_of_another_module(before, tmp_path):
    assert digests(tmp_path, PYTHONHASHSEED="7", HOME="/elsewhere") == before
    after = digests(tmp_path, helpers=HELPERS.replace("0.5", "0.6"))
    assert {name for name in before if before[name] != after[name]} == {"mine"}


def test_a_closure_is_told_by_what_it_holds():
    def make(factor):
        return lambda prompts, responses: [factor for _ in responses]

    assert digest(make(2)) == digest(make(2)) != digest(make(3))
    assert digest(make({"a": [1]})) != digest(make({"a": [2]}))


def test_objects_that_hold_themselves_and_functions_that_call_each_other_have_a_digest():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    loop = [1]
    loop.append(loop)
    assert digest([even, loop]) == digest([even, loop])


def test_rows_have_a_digest_of_all_that_is_in_them_and_of_their_order():
    rows = [Example("p", "r", {"refs": ["a"], "n": 1}), Example("q", None, {("key",): {1, 2}, "x": np.ones(2)})]
    same = [Example("p", "r", {"refs": ["a"], "n": 1}), Example("q", None, {("key",): {2, 1}, "x": np.ones(2)})]
    assert rows_digest(rows) == rows_digest(same) != rows_digest(rows[::-1])
    assert rows_digest([Example("p", "r", {"refs": ["b"], "n": 1})]) != rows_digest(rows[:1])
    assert rows_digest([Example("p", "r\udfff")]) != rows_digest([Example("p", "r")])


def test_files_and_folders_have_a_digest_of_names_and_bytes(tmp_path):
    (tmp_path / "words.txt").write_text("good fine")
    one = file_digest(tmp_path / "words.txt"), file_digest(tmp_path)
    (tmp_path / "words.txt").write_text("good evil")
    two = file_digest(tmp_path / "words.txt"), file_digest(tmp_path)
    (tmp_path / "words.txt").rename(tmp_path / "others.txt")
    three = file_digest(tmp_path / "others.txt"), file_digest(tmp_path)
    assert one[0] != two[0] == three[0]
    assert len({one[1], two[1], three[1]}) == 3


def test_a_large_file_is_read_in_64_places(tmp_path):
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(WHOLE + 1)
    before = file_digest(tmp_path / "weights")
    with (tmp_path / "weights").open("r+b") as file:
        file.seek(WHOLE)  # the last byte
        file.write(b"1")
    assert file_digest(tmp_path / "weights") != before


def test_a_hundred_megabytes_of_rows_take_seconds():
    rows = [Example("a question " * 8, "an answer " * 90, {"number": i}) for i in range(1000)]  # 1 MB
    began = time.process_time()
    rows_digest(rows)
    assert time.process_time() - began < 0.1  # 100 MB in 10 s, on a slow day; measured 1 s


def wrapped_by(factor):
    def base(prompts, responses):
        return [1.0] * len(responses)

    if factor == 2:

        @functools.wraps(base)
        def safe(prompts, responses):
            return [2.0 * x for x in base(prompts, responses)]

    else:

        @functools.wraps(base)
        def safe(prompts, responses):
            return [3.0 * x for x in base(prompts, responses)]

    return base, safe


def test_the_body_of_a_decorator_is_part_of_what_it_decorates():
    base, safe = wrapped_by(2)
    assert len({digest(base), digest(safe), digest(wrapped_by(3)[1])}) == 3
    assert digest(safe) == digest(wrapped_by(2)[1])
