"""Long rows of scorers: cut at either end as they will be as a reward, left out, or refused."""

import numpy as np
import pytest

from hybrid_jax.core.batches import Example
from hybrid_jax.core.errors import UserError
from hybrid_jax.data.long_rows import LongRows
from hybrid_jax.data.preference_stream import PreferenceStream, Reading
from hybrid_jax.data.preferences import Preference
from hybrid_jax.data.tokenizer import Bytes
from hybrid_jax.phases.classifier import Classification, ClassifierPhase

TOKENIZER = Bytes().build()
END = 256
ROWS = [
    Preference("ab", "cd", "ef", where="p.jsonl:1"),
    Preference("ab", "cdefgh", "cdefxy", where="p.jsonl:2"),
    Preference("ab", "cdxx", "efgh", where="p.jsonl:3"),
]


def test_a_scorer_reads_the_end_that_its_reading_keeps_and_the_saved_reading_says_which():
    for cut, kept in [("truncate_end", b"abc"), ("truncate_start", b"cde")]:
        reading = Reading(prompt=False, max_length=4, cut=cut)
        assert reading.rows(TOKENIZER, [""], ["abcde"])[0].tolist() == [*kept, END]
        assert Reading.of(reading.settings) == reading
    assert Reading.of({"prompt": True, "chat": False, "max_length": 4}).cut == "truncate_end"
    with pytest.raises(UserError, match=r"unknown setting 'reading\.cutt'; did you mean 'cut'"):
        Reading.of({"cutt": 1})


def test_a_long_preference_is_cut_dropped_or_refused_and_one_that_is_cut_to_a_tie_is_left_out(caplog):
    cut = PreferenceStream(ROWS, TOKENIZER, Reading(max_length=5))
    assert [bytes(row.tolist()[:-1]) for row in cut.flat] == [b"abcd", b"abef", b"cdxx", b"efgh"]
    dropped = PreferenceStream(ROWS, TOKENIZER, Reading(max_length=5), long_rows=LongRows("drop"))
    assert dropped.preferences == (ROWS[0],)
    found = "2 of 3 rows (66.7 %) of p.jsonl have more than 5 tokens (max_length), the longest 9 (line 2)"
    assert [record.getMessage() for record in caplog.records] == [
        f"{found}: 1 cut at the end, 1 left out (cut, the better and the worse would be the same); "
        "long_rows is truncate_end, or raise max_length",
        f"{found}: 2 left out; long_rows is drop, or raise max_length",
    ]
    at_start = PreferenceStream(ROWS[1:2], TOKENIZER, Reading(max_length=5, cut="truncate_start"))
    assert [bytes(row.tolist()[:-1]) for row in at_start.flat] == [b"efgh", b"efxy"]
    with pytest.raises(
        UserError, match=r"the longest 9 \(line 2\); raise max_length, or let long_rows be drop"
    ):
        PreferenceStream(ROWS, TOKENIZER, Reading(max_length=5), long_rows=LongRows("error"))


def test_a_pair_whose_answers_are_the_same_teaches_nothing_and_is_left_out_unless_it_is_a_tie(caplog):
    same = Preference("ab", "cd", "cd", where="p.jsonl:2")
    tie = Preference("ab", "cd", "cd", tie=True, where="p.jsonl:3")
    ranked = Preference("ab", "c", "e", responses=("c", "c", "e"), ranks=(0, 1, 2), where="p.jsonl:4")
    stream = PreferenceStream([ROWS[0], same, tie, ranked], TOKENIZER, Reading())
    assert stream.preferences == (ROWS[0], tie)
    assert caplog.messages == [
        "2 of 4 rows (50 %) of p.jsonl, first line 2, have the same better and worse response: left out"
    ]
    with pytest.raises(
        UserError, match=r"^no preference is left: 1 of 1 rows \(all\) of p.jsonl say the same twice"
    ):
        PreferenceStream([same], TOKENIZER, Reading())


def test_a_classifier_leaves_a_long_text_out_with_its_label(caplog):
    examples = [
        Example("", text, {"label": n}, where=f"t.jsonl:{n}") for n, text in enumerate(["a", "bcdef", "g"])
    ]
    rows, targets = _read(Classification(length=4, long_rows="drop"), examples)
    assert ([row.tolist() for row in rows], targets.tolist()) == ([[97, END], [103, END]], [0, 2])
    rows, targets = _read(Classification(length=4, long_rows="truncate_start"), examples)
    assert (rows[1].tolist(), targets.tolist()) == ([*b"def", END], [0, 1, 2])
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 3 training rows (33.3 %) of t.jsonl has more than 4 tokens (phases.mood.length), the longest 6 "
        f"(line 1): {fate}, or raise phases.mood.length"
        for fate in [
            "1 left out; phases.mood.long_rows is drop",
            "1 cut at the start; phases.mood.long_rows is truncate_start",
        ]
    ]


def _read(config: Classification, examples: list[Example]) -> tuple[list[np.ndarray], np.ndarray]:
    from types import SimpleNamespace as Fake

    phase = ClassifierPhase.__new__(ClassifierPhase)
    phase.config, phase.name, phase._length = config, "mood", config.length
    phase.resources = Fake(tokenizer=TOKENIZER, examples=examples)
    phase._labels = ("x", "y", "z")
    return phase._read(examples, "training")
